"""The losses of CLIP, CLIP-CID, MobileCLIP and CLIP-KD, one a file.

    clip_loss       contrastive.py   image-text InfoNCE
    instance_loss   instance.py      CLIP-CID: InfoNCE across modalities and models
    ClusterLoss     cluster.py       CLIP-CID: discrimination and distribution over cluster centres
    affinity_loss   affinity.py      MobileCLIP: KL of the student's similarities from the teachers'
    feature_loss    feature.py       CLIP-KD: squared distance to the teacher's embeddings

All take unit-norm embeddings (b, d) and, but for `feature_loss`, a logit scale that is already
exponentiated, and return a scalar. Those with a logit scale are calculated on whole matrices in
plain torch or, for large batches, in tiles and linear memory, with the same value and gradients:
`backend`, which chooses by itself (backends.py; the tiles are in tiled/).
"""

from mclip.losses.affinity import affinity_loss
from mclip.losses.cluster import ClusterLoss
from mclip.losses.contrastive import clip_loss
from mclip.losses.feature import feature_loss
from mclip.losses.instance import instance_loss

__all__ = ["ClusterLoss", "affinity_loss", "clip_loss", "feature_loss", "instance_loss"]
