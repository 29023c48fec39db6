"""The losses over pairs without their (b, b) matrices, that over clusters without (b, centres).

`tiled.clip_loss`, `affinity_loss` and `instance_loss` take the places of those in `mclip.losses`,
in any training loop, `clusters.cluster_loss(module, ...)` that of calling a
`mclip.losses.ClusterLoss`:

    from mclip.losses.tiled import tiled
    loss = tiled.clip_loss(image, text, logit_scale)                    # unit-norm (b, d) rows, scale exponentiated
    loss = loss + tiled.affinity_loss(image, text, [(t_image, t_text, 100.0)], logit_scale)

    tiled.py clusters.py             the losses, over one process or several (ring.py)
    tiles.py                         what they share, and the choice of a back end (backend="auto")
    torch_tiles.py triton_tiles.py   the back ends: a tile's softmax statistics, and its gradient

The Triton kernels are tested by Triton's interpreter and compiled for compute capability 9.0; none
has run on a GPU.
"""
