"""MobileCLIP by name, its text encoder MCt, folding, and weights under the published names."""

import re

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from mclip import models
from mclip.models import mct

TOKENS = torch.randint(1, 49407, (3, 77), generator=torch.Generator().manual_seed(0))
TINY = {
    "embed_dim": 16,
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "resnet10t", "timm_proj": "linear", "image_size": 32},
    "text_cfg": {
        "context_length": 9,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
        "no_causal_mask": True,
        mct.KEY: 5,
    },
}
# image and text tower, M: arXiv 2311.17049, Table 1; CLIP's own for the two others
PUBLISHED = {
    "MobileCLIP-S0": (11.4, 42.4),
    "MobileCLIP-S1": (21.5, 63.4),
    "MobileCLIP-S2": (35.7, 63.4),
    "MobileCLIP-B": (86.3, 63.4),
    "ViT-B-16": (86.2, 63.4),
    "ViT-B-32": (87.8, 63.4),
}


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """A module whose statistics and scales are those of no new one, so that folding has something
    to get wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1, generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)
            m.weight.data.uniform_(0.5, 1.5, generator=generator)
            m.bias.data.normal_(std=0.1, generator=generator)
    for name, p in module.named_parameters():
        if "layer_scale" in name:
            p.data.uniform_(-0.5, 0.5, generator=generator)
    return module.eval()


def count(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model, _, _, tokenizer = models.create(name, device="meta")
    image = (
        count(models.inference.reparameterize_model(model.visual))
        if "MobileCLIP-S" not in name
        else None
    )
    if (
        image is None
    ):  # merging branches multiplies weights, which meta tensors have none of; what is published
        model = models.create(name)[
            0
        ]  # counts single convolutions, but batch norm and LayerScale by themselves
        image = count(models.inference.reparameterize_model(model.visual))
    assert (round(image, 1), round(count(model) - count(model.visual), 1)) == PUBLISHED[name]
    assert tokenizer(["a cat"]).shape == (1, 77)


def test_a_vit_may_be_written_with_a_slash():
    assert models.factory._split("ViT-B/32") == ("ViT-B-32", None)
    assert models.factory._split("ViT-B/16/openai") == ("ViT-B-16", "openai")


def plain_block(x, b):
    """RepMixerBlock in eval mode, written out: x (tokens, width), float64; b: its parameters."""

    def norm(x, at):
        scale = b[f"{at}.weight"] / (b[f"{at}.running_var"] + 1e-5).sqrt()
        return (x - b[f"{at}.running_mean"]) * scale + b[f"{at}.bias"]

    def along(x, weight):  # a kernel a channel, zeros outside
        k, out = weight.shape[-1], torch.zeros_like(x)
        for t in range(len(x)):
            for j in range(k):
                if 0 <= t + j - k // 2 < len(x):
                    out[t] += weight[:, 0, 0, j] * x[t + j - k // 2]
        return out

    mixer = norm(x, "token_mixer.mixer.rbr_skip") + norm(
        along(x, b["token_mixer.mixer.rbr_conv.0.conv.weight"]), "token_mixer.mixer.rbr_conv.0.bn"
    )
    x = x + b["token_mixer.layer_scale"].flatten() * (mixer - norm(x, "token_mixer.norm.rbr_skip"))
    y = norm(along(x, b["convffn.conv.conv.weight"]), "convffn.conv.bn")
    y = F.gelu(y @ b["convffn.fc1.weight"].flatten(1).T + b["convffn.fc1.bias"])
    return x + b["layer_scale"].flatten() * (
        y @ b["convffn.fc2.weight"].flatten(1).T + b["convffn.fc2.bias"]
    )


@pytest.mark.parametrize(("width", "kernel", "tokens"), [(8, 5, 9), (6, 11, 7), (4, 1, 3)])
def test_a_block_is_what_it_says_before_and_after_folding(width, kernel, tokens):
    torch.manual_seed(0)
    block = trained(mct.RepMixerBlock(width, kernel)).double()
    x = torch.randn(2, tokens, width, dtype=torch.float64)
    expected = torch.stack([plain_block(row, block.state_dict()) for row in x])
    with torch.no_grad():
        assert torch.allclose(block(x), expected, atol=1e-12)
        for _ in range(2):
            block.token_mixer.reparameterize()
            block.convffn.reparameterize()
            assert torch.allclose(block(x), expected, atol=1e-12)
    assert not [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_block_learns_in_all_its_parameters():
    block = mct.RepMixerBlock(8, 5).train()
    block(torch.randn(4, 9, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
    assert block.token_mixer.norm.rbr_skip.running_mean.abs().sum() > 0


def test_what_a_kernel_may_be():
    with pytest.raises(ValueError, match="odd number of tokens, found 4"):
        open_clip.model._build_text_tower(8, TINY["text_cfg"] | {mct.KEY: 4})
    with pytest.raises(ValueError, match="no_causal_mask"):
        open_clip.model._build_text_tower(8, TINY["text_cfg"] | {"no_causal_mask": False})


def test_registering_twice_is_once():
    before = open_clip.model._build_text_tower
    mct.register()
    assert open_clip.model._build_text_tower is before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileCLIP-S0", "MobileCLIP-B"])
def test_folding_keeps_the_outputs_of_both_towers(name):
    torch.manual_seed(0)
    model = trained(models.create(name)[0])
    size = models.image_size(model)
    x = torch.randn(2, 3, size, size)
    fast = models.for_inference(model)
    again = models.for_inference(fast)
    left = [k for k, m in fast.named_modules() if isinstance(m, nn.BatchNorm2d)]
    # before attention, where a residual branch passes it by, a batch norm is none of a
    # convolution's
    assert left == (
        ["visual.trunk.stages.3.blocks.0.norm", "visual.trunk.stages.3.blocks.1.norm"]
        if name[-1] == "0"
        else []
    )
    # and the scale after attention is no convolution's either
    left = [k for k, m in fast.visual.named_modules() if type(m).__name__ == "LayerScale2d"]
    assert left == (
        [f"trunk.stages.3.blocks.{i}.layer_scale_1" for i in (0, 1)] if name[-1] == "0" else []
    )
    with torch.no_grad():
        for one, args in (("encode_image", x), ("encode_text", TOKENS)):
            expected = getattr(model, one)(args, normalize=True)
            assert torch.allclose(getattr(fast, one)(args, normalize=True), expected, atol=1e-4)
            assert torch.equal(getattr(again, one)(args), getattr(fast, one)(args))
    assert count(fast) < count(model) or name == "MobileCLIP-B"


def test_mct_through_open_clips_own_factory(tmp_path):
    torch.manual_seed(0)
    model = trained(
        open_clip.CustomTextCLIP(**{k: v for k, v in TINY.items() if k != "custom_text"})
    )
    tokens = TOKENS[:, :9]
    models.export(model, tmp_path, config=TINY)
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    with torch.no_grad():
        assert torch.equal(again.eval().encode_text(tokens), model.encode_text(tokens))
        fast = models.for_inference(again)
        assert torch.allclose(fast.encode_text(tokens), model.encode_text(tokens), atol=1e-4)
    again.lock_text_tower(unlocked_layers=2)
    assert any(p.requires_grad for p in again.text.parameters())
    again.set_grad_checkpointing()
    again.train().encode_text(tokens).sum().backward()
    with pytest.raises(models.ModelError, match="is folded for inference"):
        models.export(fast, tmp_path / "folded", config=TINY)
    assert not (tmp_path / "folded").exists()


def published_names(model) -> dict[str, torch.Tensor]:
    """A model's weights under the names of MobileCLIP's published checkpoints."""
    out = {"logit_scale": model.logit_scale.data}
    for name, tensor in model.visual.trunk.state_dict().items():
        if name == "head.fc.bias":  # a matrix there, zeros here
            tensor.zero_()
            continue
        if name == "head.fc.weight":
            name, tensor = "head.proj", tensor.T.contiguous()
        # its `network` is a flat list of stages' blocks, downsampling and, before the last stage, a
        # position encoding
        if match := re.match(r"stages\.(\d)\.(downsample\.proj|pos_emb\.pos_enc|blocks)(.*)", name):
            stage, kind = int(match[1]), match[2]
            at = {
                "downsample.proj": 2 * stage - 1,
                "pos_emb.pos_enc": 2 * stage,
                "blocks": 2 * stage + (stage == 3),
            }[kind]
            name = f"network.{at}{ {'downsample.proj': '.proj', 'pos_emb.pos_enc': '.pe', 'blocks': ''}[kind] }{match[3]}"
        for here, there in (
            ("stem", "patch_embed"),
            ("conv_kxk", "rbr_conv"),
            ("conv_scale", "rbr_scale"),
            ("identity", "rbr_skip"),
            ("final_conv", "conv_exp"),
            ("large_conv", "lkb_origin"),
            ("mlp", "convffn"),
            ("se.fc1", "se.reduce"),
            ("se.fc2", "se.expand"),
            (".gamma", ""),
        ):
            name = name.replace(here, there)
        out[f"image_encoder.model.{name}"] = tensor
    for name, tensor in model.text.state_dict().items():
        if name == "positional_embedding":
            name, tensor = "positional_embedding.pos_embed.pos_embed", tensor[None, None]
        for here, there in (
            ("token_embedding", "embedding_layer"),
            ("text_projection", "projection_layer"),
            ("ln_final", "final_layer_norm"),
            ("transformer.resblocks.", "transformer."),
            ("attn.in_proj_", "attn.qkv_proj."),
            ("ln_1", "pre_norm_mha.0"),
            ("attn.", "pre_norm_mha.1."),
            ("ln_2", "pre_norm_ffn.0"),
            ("mlp.c_fc", "pre_norm_ffn.1"),
            ("mlp.c_proj", "pre_norm_ffn.4"),
        ):
            name = name.replace(here, there)
        out[f"text_encoder.{name}"] = tensor
    return {k: v.clone() for k, v in out.items()}


def names_of_the_text_encoder() -> dict[str, tuple[int, ...]]:
    """Those of mobileclip_s0.pt, from its published source."""
    out = {
        "embedding_layer.weight": (49408, 512),
        "positional_embedding.pos_embed.pos_embed": (1, 1, 77, 512),
        "final_layer_norm.weight": (512,),
        "final_layer_norm.bias": (512,),
        "projection_layer": (512, 512),
    }
    for i in (0, 5):
        at = f"transformer.{i}."
        for norm in (
            "token_mixer.norm.rbr_skip",
            "token_mixer.mixer.rbr_skip",
            "token_mixer.mixer.rbr_conv.0.bn",
            "convffn.conv.bn",
        ):
            out |= {
                f"{at}{norm}.{k}": (512,) for k in ("weight", "bias", "running_mean", "running_var")
            }
            out[f"{at}{norm}.num_batches_tracked"] = ()
        out |= {
            f"{at}token_mixer.mixer.rbr_conv.0.conv.weight": (512, 1, 1, 11),
            f"{at}convffn.conv.conv.weight": (512, 1, 1, 11),
            f"{at}token_mixer.layer_scale": (512, 1, 1),
            f"{at}layer_scale": (512, 1, 1),
            f"{at}convffn.fc1.weight": (2048, 512, 1, 1),
            f"{at}convffn.fc1.bias": (2048,),
            f"{at}convffn.fc2.weight": (512, 2048, 1, 1),
            f"{at}convffn.fc2.bias": (512,),
        }
    for i in range(1, 5):
        at = f"transformer.{i}.pre_norm_"
        out |= {
            f"{at}mha.0.weight": (512,),
            f"{at}mha.0.bias": (512,),
            f"{at}ffn.0.weight": (512,),
            f"{at}ffn.0.bias": (512,),
            f"{at}mha.1.qkv_proj.weight": (1536, 512),
            f"{at}mha.1.qkv_proj.bias": (1536,),
            f"{at}mha.1.out_proj.weight": (512, 512),
            f"{at}mha.1.out_proj.bias": (512,),
            f"{at}ffn.1.weight": (2048, 512),
            f"{at}ffn.1.bias": (2048,),
            f"{at}ffn.4.weight": (512, 2048),
            f"{at}ffn.4.bias": (512,),
        }
    return {f"text_encoder.{k}": v for k, v in out.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A synthetic mobileclip_s0.pt, and the model whose weights it has."""
    torch.manual_seed(1)
    model = trained(models.create("MobileCLIP-S0")[0], seed=1)
    path = tmp_path_factory.mktemp("published") / "mobileclip_s0.pt"
    state = published_names(model)
    torch.save(state, path)
    return path, model, state


@pytest.mark.slow
def test_published_weights_by_their_names(checkpoint):
    path, model, state = checkpoint
    assert {
        k: tuple(v.shape) for k, v in state.items() if k.startswith("text_encoder.")
    } == names_of_the_text_encoder()
    assert state["image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight"].shape == (64, 3, 3, 3)
    loaded, *_ = models.create(f"MobileCLIP-S0/{path}")
    expected = model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
    assert (
        loaded.visual.preprocess_cfg["mean"] == (0.0,) * 3
        and loaded.visual.preprocess_cfg["std"] == (1.0,) * 3
    )
    assert loaded.visual.preprocess_cfg["interpolation"] == "bilinear"
    assert models.factory.weights_file(f"MobileCLIP-S0/{path}") == path


def one_line(name: str) -> str:
    with pytest.raises(models.ModelError) as err:
        models.create(name)
    assert "\n" not in str(err.value)
    return str(err.value)


@pytest.mark.slow
def test_weights_that_do_not_fit(checkpoint, tmp_path):
    path, _, state = checkpoint
    said = one_line(f"MobileCLIP-S2/{path}")
    assert "has shape (64, 3, 3, 3), expected (80, 3, 3, 3) (and" in said and said.endswith(
        "they fit MobileCLIP-S0"
    )
    torch.save(
        {k: v for k, v in state.items() if "projection_layer" not in k}, tmp_path / "less.pt"
    )
    assert "text.text_projection is missing" in one_line(f"MobileCLIP-S0/{tmp_path}/less.pt")
    torch.save(
        {k.replace("fc1.bias", "fc1.bais"): v for k, v in state.items()}, tmp_path / "misspelt.pt"
    )
    said = one_line(f"MobileCLIP-S0/{tmp_path}/misspelt.pt")
    assert "convffn.fc1.bias is missing (and" in said or "mlp.fc1.bias is missing (and" in said
    assert "nearest is" in said and "fc1.bais" in said
    torch.save({k: v for k, v in state.items() if k != "logit_scale"}, tmp_path / "scale.pt")
    assert "logit_scale is missing" in one_line(f"MobileCLIP-S0/{tmp_path}/scale.pt")


class Pickled:
    pass


def test_files_that_are_no_weights(tmp_path):
    torch.save({"image_encoder.model": Pickled()}, tmp_path / "code.pt")
    assert "is no file of weights alone" in one_line(f"MobileCLIP-S0/{tmp_path}/code.pt")
    (tmp_path / "short.pt").write_bytes(b"PK")
    assert "is no file of weights alone" in one_line(f"MobileCLIP-S0/{tmp_path}/short.pt")
    assert f"there is no file {tmp_path}/none.pt" in one_line(f"MobileCLIP-S0/{tmp_path}/none.pt")
    assert "did you mean MobileCLIP-S0" in one_line("mobileclip_s0")


def test_a_folder_whose_weights_are_of_another_width(tmp_path):
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**{k: v for k, v in TINY.items() if k != "custom_text"})
    models.export(model, tmp_path, config=TINY | {"text_cfg": TINY["text_cfg"] | {"width": 64}})
    said = one_line(f"local-dir:{tmp_path}")
    assert "has shape (9, 32), expected (9, 64)" in said
    models.export(model, tmp_path, config=TINY)
    file = tmp_path / "open_clip_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "ln_final" not in k}, file)
    assert "text.ln_final.weight is missing (and 1 more)" in one_line(f"local-dir:{tmp_path}")
