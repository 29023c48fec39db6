"""The default data: emoji and CIFAR-10 pictures from package registries, with captions."""
