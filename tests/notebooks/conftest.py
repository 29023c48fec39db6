def pytest_configure(config):
    config.addinivalue_line(
        "markers", "pipeline: runs all stages, small (minutes); -m 'not pipeline' skips it"
    )
