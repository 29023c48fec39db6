"""The losses of CLIP, CLIP-CID and MobileCLIP, one a file, in plain torch.

    clip_loss       contrastive.py   image-text InfoNCE
    instance_loss   instance.py      CLIP-CID: InfoNCE across modalities and models
    ClusterLoss     cluster.py       CLIP-CID: discrimination and distribution over cluster centres
    affinity_loss   affinity.py      MobileCLIP: KL between teachers' and student's similarity matrices

All take unit-norm embeddings (b, d) and a logit scale that is already exponentiated, and return a
scalar.
"""

from mclip.losses.affinity import affinity_loss
from mclip.losses.cluster import ClusterLoss
from mclip.losses.contrastive import clip_loss
from mclip.losses.instance import instance_loss

__all__ = ["ClusterLoss", "affinity_loss", "clip_loss", "instance_loss"]
