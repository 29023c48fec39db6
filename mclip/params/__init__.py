"""The schema of params.yaml: every key, its type and its range; overlays; errors that name the key.

    mclip params check                          # is params.yaml valid?
    mclip params apply params/smoke.yaml        # lay a setting over params.yaml, comments kept
    git checkout params.yaml                    # and back

In a notebook::

    from mclip import params
    p = params.stage(sections) # what the stage picked of params.yaml; all of it when opened by hand
    p.balance.threshold
"""

from mclip.params.ablations import Amount, KeptPairs, Learning, Selection, Study, Variant
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
from mclip.params.tree import ParamsError, merge, pick, read_yaml, varied
from mclip.params.view import stage

__all__ = [
    "Align",
    "Amount",
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
    "Selection",
    "Study",
    "TeacherParts",
    "Teachers",
    "Train",
    "Variant",
    "apply_overlay",
    "check",
    "load",
    "merge",
    "pick",
    "read_yaml",
    "stage",
    "varied",
]
