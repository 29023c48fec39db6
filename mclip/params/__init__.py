"""The schema of params.yaml: every key, its type and its range; overlays; errors that name the key.

    mclip params check                          # is params.yaml valid?
    mclip params apply params/smoke.yaml        # lay a setting over params.yaml, comments kept
    git checkout params.yaml                    # and back

In a notebook::

    from mclip import params
    p = params.stage(sections)    # what the stage picked; opened by hand: all of params.yaml
    p.balance.threshold
"""

from mclip.params.ablations import KeptPairs, Learning, Selection, Study, Variant
from mclip.params.schema import Params, apply_overlay, check, load
from mclip.params.sections import (
    Align,
    Balance,
    CaptionerTrain,
    Cluster,
    Data,
    DemoData,
    EvalSet,
    Recipe,
    Reinforce,
    TeacherParts,
    Teachers,
    Train,
)
from mclip.params.tree import ParamsError, Section, absent, explain, merge, pick, read_yaml, varied
from mclip.params.view import stage

__all__ = [
    "Align",
    "Balance",
    "CaptionerTrain",
    "Cluster",
    "Data",
    "DemoData",
    "EvalSet",
    "KeptPairs",
    "Learning",
    "Params",
    "ParamsError",
    "Recipe",
    "Reinforce",
    "Section",
    "Selection",
    "Study",
    "TeacherParts",
    "Teachers",
    "Train",
    "Variant",
    "absent",
    "apply_overlay",
    "check",
    "explain",
    "load",
    "merge",
    "pick",
    "read_yaml",
    "stage",
    "varied",
]
