"""Tiny random checkpoints of DeepSeek-OCR: the first in the layout of its published repository, the second a native one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.tiny_family import TinyFamily, names
from vlm.families.deepseek_media import PLAIN_CHAT_TEMPLATE

CONTEXT_LENGTH_TOKENS = 4096
BEGIN, END, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE, GROUNDING = "<image>", "<|grounding|>"
MARKS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>")
VOCAB_SIZE = 1024

# A decoder with one dense layer and one with four routed experts, two of which see each token.
_LANGUAGE: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": CONTEXT_LENGTH_TOKENS,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": VOCAB_SIZE,
}


def build_deepseek_tokenizer() -> Any:
    """The built-in byte-level BPE with DeepSeek's special tokens; ids 0, 1, 2 begin, end and pad, as published.

    Returns:
        A `tokenizers.Tokenizer`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    from vlm.builtin.tokenizer import build_tokenizer

    description = json.loads(build_tokenizer().backend_tokenizer.to_str())
    vocab: dict[str, int] = description["model"]["vocab"]
    merges = [tuple(merge) for merge in description["model"]["merges"]]
    first = (BEGIN, END, PAD)
    last = (IMAGE, GROUNDING, *MARKS)
    assert len(vocab) + len(first) + len(last) <= VOCAB_SIZE + 1
    # The last pieces, and the merges that make them, give way to the special tokens.
    num_pieces = VOCAB_SIZE - len(first) - len(last)
    dropped = {piece for piece, id_ in vocab.items() if id_ >= num_pieces}
    pieces = {piece: id_ + len(first) for piece, id_ in vocab.items() if id_ < num_pieces}
    pieces |= {token: id_ for id_, token in enumerate(first)}
    kept = [merge for merge in merges if "".join(merge) not in dropped and not dropped.intersection(merge)]
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=kept))
    tokenizer.normalizer = normalizers.NFC()  # the published one has none; the tests' other tokenizers have this
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*first, *last)])
    return tokenizer


def _write_tokenizer(directory: Path) -> None:
    build_deepseek_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BEGIN,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "legacy": True,
        "model_max_length": 1_000_000,
        "pad_token": PAD,
        "sp_model_kwargs": {},
        # As published; this class would cut text in another way than the tokenizer.json beside it.
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
        "use_default_system_prompt": False,
    }
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def image_token_id() -> int:
    """Id of the image token in the tiny tokenizer."""
    return int(build_deepseek_tokenizer().token_to_id(IMAGE))


def _build_first(tie: bool) -> Any:
    from transformers import UnlimitedOcrConfig, UnlimitedOcrForConditionalGeneration

    from vlm.families.deepseek_config import translate

    assert not tie, "the published model has a head of its own"
    return UnlimitedOcrForConditionalGeneration(UnlimitedOcrConfig.from_dict(translate(published_config())))


def _write_first(model: Any, dir: Path) -> None:
    """Writes the files, key names and config sections of the published DeepSeek-OCR.

    Its views are smaller (256 and 128 pixels), which takes a `preprocessor_config.json` that the published one lacks.
    """
    _give_experts_weight(model)
    model.save_pretrained(dir)  # under the published names
    (dir / "generation_config.json").unlink()
    _write_json(dir / "config.json", published_config())
    _write_tokenizer(dir)
    processor = {
        "add_special_token": False,
        "candidate_resolutions": [[1024, 1024]],
        "downsample_ratio": 4,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_token": IMAGE,
        "patch_size": 16,
        "processor_class": "DeepseekVLV2Processor",
        "sft_format": "deepseek",
    }
    _write_json(dir / "processor_config.json", processor)
    _write_json(dir / "preprocessor_config.json", image_settings(256, 128, 2, 9))


def published_config() -> dict[str, Any]:
    """A `config.json` with the sections and names of the published one, at tiny sizes."""
    language = {
        **_LANGUAGE,
        "architectures": ["DeepseekV2ForCausalLM"],
        "kv_lora_rank": None,
        "lm_head": True,
        "q_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "rm_head": False,
        "torch_dtype": "float32",
        "use_mla": False,
        "v_head_dim": 0,
    }
    return {
        "architectures": ["DeepseekOCRForCausalLM"],
        # Code beside the weights, which must never be looked at.
        "auto_map": {
            "AutoConfig": "modeling_deepseekocr.DeepseekOCRConfig",
            "AutoModel": "modeling_deepseekocr.DeepseekOCRForCausalLM",
        },
        "candidate_resolutions": [[1024, 1024]],
        "global_view_pos": "head",
        "image_token_id": image_token_id(),
        "language_config": language,
        "model_type": "deepseek_vl_v2",
        "projector_config": {
            "input_dim": 128,
            "model_type": "mlp_projector",
            "n_embed": 64,
            "projector_type": "linear",
        },
        "tile_tag": "2D",
        "torch_dtype": "float32",
        "vision_config": {
            "image_size": 256,
            "mlp_ratio": 3.7362,
            "model_name": "deeplip_b_l",
            "model_type": "vision",
            "width": {
                "clip-l-14-224": {"heads": 2, "image_size": 56, "layers": 2, "patch_size": 14, "width": 64},
                "sam_vit_b": {
                    "downsample_channels": [64, 64],
                    "global_attn_indexes": [1],
                    "heads": 2,
                    "layers": 2,
                    "width": 64,
                },
            },
        },
        **{name: value for name, value in language.items() if name not in ("architectures", "torch_dtype")},
    }


def _build_second(tie: bool) -> Any:
    """The model has 16 x 16 queries for a page and 12 x 12 for a crop, whatever its sizes.

    With patches of 4 pixels this fits pages of 256 and crops of 192 pixels. Its first encoder only has windows: full
    attention over 4,096 patches is most of a test's time otherwise.
    """
    from transformers import DeepseekOcr2Config, DeepseekOcr2ForConditionalGeneration

    assert not tie, "the published model has a head of its own"
    language = {name: value for name, value in _LANGUAGE.items() if name != "first_k_dense_replace"}
    sam = {
        "hidden_size": 64,
        "output_channels": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 256,
        "patch_size": 4,
        "window_size": 8,
        "global_attn_indexes": [],
        "mlp_dim": 128,
        "downsample_channels": [64, 64],
    }
    encoder = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = DeepseekOcr2Config(
        text_config={**language, "pad_token_id": 2, "mlp_layer_types": ["dense", "sparse"]},
        vision_config={"sam_config": sam, "encoder_config": encoder},
        image_token_id=image_token_id(),
    )
    return DeepseekOcr2ForConditionalGeneration(config)


def _write_second(model: Any, dir: Path) -> None:
    """Writes a checkpoint in transformers' own layout."""
    from transformers import GenerationConfig

    _give_experts_weight(model)
    model.generation_config = GenerationConfig(eos_token_id=[1], pad_token_id=2, no_repeat_ngram_size=20)
    model.save_pretrained(dir)
    _write_tokenizer(dir)
    settings = {**image_settings(256, 192, 2, 6), "image_processor_type": "DeepseekOcr2ImageProcessor"}
    settings["processor_class"] = "DeepseekOcr2Processor"
    _write_json(dir / "preprocessor_config.json", settings)
    processor = {"downsample_ratio": 4, "patch_size": 4, "processor_class": "DeepseekOcr2Processor"}
    _write_json(dir / "processor_config.json", processor)


def image_settings(size: int, tile_size: int, min_patches: int, max_patches: int) -> dict[str, Any]:
    """A `preprocessor_config.json`."""
    return {
        "background_color": [127, 127, 127],
        "crop_to_patches": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "UnlimitedOcrImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_patches": max_patches,
        "min_patches": min_patches,
        "processor_class": "UnlimitedOcrProcessor",
        "size": {"height": size, "width": size},
        "tile_size": tile_size,
    }


def _give_experts_weight(model: Any) -> None:
    """Noise of a size at which experts and learnt single vectors matter as much as the rest does."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".experts." in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif name.endswith(("view_separator", "image_newline", "class_embedding")):
                parameter.normal_(0, 0.5, generator=generator)


def _stock_processor(class_name: str, folder: Path) -> Any:
    """The stock processor over Pillow's image processor, and for the first model over a slow one of our own."""
    import transformers

    stock: Any = getattr(transformers, class_name)
    slow: Any = (
        transformers.DeepseekOcr2ImageProcessorPil if class_name == "DeepseekOcr2Processor" else slow_processor()
    )

    class AnyParts(stock):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None

    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    return AnyParts(
        slow.from_pretrained(folder),
        transformers.PreTrainedTokenizerFast.from_pretrained(folder),
        chat_template=PLAIN_CHAT_TEMPLATE,
        patch_size=settings["patch_size"],
        downsample_ratio=settings["downsample_ratio"],
    )


def slow_processor() -> Any:
    """An image processor written from the description of DeepSeek-OCR's "Gundam" mode, with Pillow, one view at a time.

    A page of which one side is longer than a crop's is stretched over the grid of crops nearest to its shape, and cut.
    The global view is the page fitted into a grey square. Both are scaled to -1 .. 1.
    """
    from transformers import BatchFeature, DeepseekOcr2ImageProcessorPil

    class Slow(DeepseekOcr2ImageProcessorPil):
        def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> Any:
            import numpy as np
            from PIL import Image, ImageOps

            data: dict[str, Any] = {name: [] for name in ("pixel_values", "num_local_patches", "patches_grid")}
            local = []

            def scaled(view: Any) -> Any:
                return np.asarray(view, np.float32).transpose(2, 0, 1) / 127.5 - 1

            for image in images if isinstance(images, list) else [images]:
                page = image if isinstance(image, Image.Image) else Image.fromarray(image)
                page, tile = page.convert("RGB"), self.tile_size
                side = self.size["height"]
                square = ImageOps.pad(page, (side, side), Image.Resampling.BICUBIC, color=(127, 127, 127))
                data["pixel_values"].append(scaled(square))
                grid = (1, 1)
                if page.width > tile or page.height > tile:
                    counts = range(self.min_patches, self.max_patches + 1)
                    candidates = sorted(
                        {(w, h) for w in range(1, 10) for h in range(1, 10) if w * h in counts},
                        key=lambda grid: (grid[0] * grid[1], grid),
                    )
                    distances = [abs(page.width / page.height - w / h) for w, h in candidates]
                    nearest = [g for g, d in zip(candidates, distances, strict=True) if d == min(distances)]
                    grid = nearest[0]
                    for larger in nearest[1:]:
                        if page.width * page.height > 0.5 * tile * tile * larger[0] * larger[1]:
                            grid = larger
                    canvas = page.resize((tile * grid[0], tile * grid[1]), Image.Resampling.BICUBIC)
                    for row in range(grid[1]):
                        for column in range(grid[0]):
                            left, top = column * tile, row * tile
                            local.append(scaled(canvas.crop((left, top, left + tile, top + tile))))
                data["num_local_patches"].append(grid[0] * grid[1] if grid != (1, 1) else 0)
                data["patches_grid"].append(list(grid))
            if local:
                data["pixel_values_local"] = local
            return BatchFeature(
                data, tensor_type=return_tensors, skip_tensor_conversion=["num_local_patches", "patches_grid"]
            )

        __call__ = preprocess

    return Slow


_LANGUAGE_MLP = ("gate_proj", "up_proj", "down_proj")
_SAM = "model.vision_tower.sam_encoder.layers.{}."


def _tiny(
    build: Callable[[bool], Any],
    write: Callable[[Any, Path], None],
    class_name: str,
    encoder: str,
    attention: tuple[str, ...],
    mlp: tuple[str, ...],
    idle_parameters: tuple[str, ...] = (),
) -> TinyFamily:
    experts = "model.language_model.layers.1.mlp.experts."
    return TinyFamily(
        build=build,
        write=write,
        processor_class=class_name,
        stock_processor=partial(_stock_processor, class_name),
        answer_start=" image.",
        marks_answers=False,
        end_of_turn=END,
        pad_token=PAD,
        image_tokens=(IMAGE,),
        language_attention=names(
            "model.language_model.layers.{}.self_attn.", 2, ("q_proj", "k_proj", "v_proj", "o_proj")
        ),
        language_mlp=(
            *names("model.language_model.layers.{}.mlp.", 1, _LANGUAGE_MLP),
            *(f"model.language_model.layers.1.mlp.shared_experts.{name}" for name in _LANGUAGE_MLP),
        ),
        language_experts=(f"{experts}gate_up_proj", f"{experts}down_proj"),
        vision_attention=(
            *names(_SAM + "attn.", 2, ("qkv", "proj")),
            *names(encoder + "self_attn.", 2, attention),
        ),
        vision_mlp=(*names(_SAM + "mlp.", 2, ("lin1", "lin2")), *names(encoder + "mlp.", 2, mlp)),
        projector=("model.multi_modal_projector",),
        language_layers=("model.language_model.layers.0", "model.language_model.layers.1"),
        vision_layers=(*names(_SAM[:-1], 2, ("",)), *names(encoder[:-1], 2, ("",))),
        idle_parameters=idle_parameters,
    )


DEEPSEEK_OCR = _tiny(
    _build_first,
    _write_first,
    "UnlimitedOcrProcessor",
    "model.vision_tower.vision_encoder.encoder.layers.{}.",
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("fc1", "fc2"),
)
DEEPSEEK_OCR2 = _tiny(
    _build_second,
    _write_second,
    "DeepseekOcr2Processor",
    "model.vision_tower.vision_encoder.layers.{}.",
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    _LANGUAGE_MLP,
    # The queries for crops; no image of the tests' datasets is larger than one crop.
    idle_parameters=("model.vision_tower.query_768_resolution.weight",),
)
