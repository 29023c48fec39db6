"""The losses over pairs without their (b, b) matrices: `tiled.clip_loss` and `tiled.affinity_loss`, plain torch.

They take the places of `mclip.losses.clip_loss` and `affinity_loss`, in any training loop:

    from mclip.kernels import tiled
    loss = tiled.clip_loss(image, text, logit_scale)                    # unit-norm (b, d) rows, scale exponentiated
    loss = loss + tiled.affinity_loss(image, text, [(t_image, t_text, 100.0)], logit_scale)
"""
