"""The losses over pairs without their (b, b) matrices, that over clusters without (b, centres).

The public losses in `mclip.losses` call these by `backend`; called by themselves they take the size
of a tile as well:

    from mclip.losses.tiled import pairs
    loss = pairs.clip_loss(image, text, logit_scale, tile=256)     # unit-norm (b, d) rows

    pairs.py clusters.py             the losses, over one process or several (ring.py)
    tiles.py                         what they share, and the choice of what makes a tile
    torch_tiles.py triton_tiles.py   a tile's softmax statistics, and its gradient

The Triton kernels are tested by Triton's interpreter and compiled for compute capability 9.0; none
has run on a GPU.
"""
