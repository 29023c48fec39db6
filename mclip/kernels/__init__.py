"""The losses over pairs without their (b, b) matrices, that over clusters without (b, centres): plain torch.

`tiled.clip_loss`, `affinity_loss` and `instance_loss` take the places of those in `mclip.losses`, in any training loop,
`clusters.cluster_loss(module, ...)` that of calling a `mclip.losses.ClusterLoss`:

    from mclip.kernels import tiled
    loss = tiled.clip_loss(image, text, logit_scale)                    # unit-norm (b, d) rows, scale exponentiated
    loss = loss + tiled.affinity_loss(image, text, [(t_image, t_text, 100.0)], logit_scale)
"""
