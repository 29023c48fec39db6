"""The papers' own numbers that the ablations show beside ours, with their sources; percent.

None of them was measured here: other data, other students, other sets. What a paper says in words
only is a claim of the notebook; numbers that are not published are not here.
"""

CLIP_CID, MOBILECLIP = "arXiv 2408.09441", "arXiv 2311.17049"

# CLIP-CID, Table 4: threshold of the balance -> images removed of LAION-400M; 0.07 is its best row,
# 0.08 clearly worse
REMOVED = {0.07: 43.7, 0.08: 47.5}

# CLIP-CID, Table 5: loss terms -> mean of 14 sets, ViT-B/32; of the last row the linear probe is
# not known
TERMS_ZERO_SHOT = {"contrastive": 67.4, "+ cluster": 68.3, "+ instance": 69.4}
TERMS_LINEAR_PROBE = {"contrastive": 84.1, "+ cluster": 85.7}

# CLIP-CID, Table 6: number of clusters tried, and the best
CLUSTERS_TRIED, CLUSTERS_BEST = (100_000, 5_000_000), 1_000_000

# MobileCLIP's ablation, ViT-B/16, 12M pairs, 30k iterations; each row adds to the one before
REINFORCEMENT_IMAGENET = {
    "contrastive": 44.5,
    "+ synthetic captions": 51.9,
    "distillation only": 54.5,
    "+ strong augmentation": 59.3,
    "+ ensemble": 61.7,
    "lambda 0.7": 60.7,
}
REINFORCEMENT_FLICKR = {
    "contrastive": 41.8,
    "+ synthetic captions": 69.3,
    "distillation only": 66.1,
    "+ strong augmentation": 70.5,
    "+ ensemble": 72.0,
    "lambda 0.7": 74.2,
}
# the numbers at which more of them stop to help
ENOUGH = {"augmentations": 5, "captions": 2}

# MobileCLIP, abstract and Figure 6: learning efficiency, the smallest and the largest it names
EFFICIENCY = (10, 1000)

# MobileCLIP: hours an epoch of its 12M set
EPOCH_HOURS = {"plain": 1.3, "reinforced": 1.3, "teachers online": 4.1, "everything online": 21.1}
