"""A notebook on a GPU: NF4, the notebooks' own trainer settings, answers, the merged model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm
from tests.support.tiny_models import TINY_FAMILIES
from vlm.lora.peft_model import adapter_parameters

pytestmark = [
    pytest.mark.gpu,
    # TRL's trainer refuses several: it asks for a launcher, or for CUDA_VISIBLE_DEVICES.
    pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs exactly one visible CUDA device"),
    # trl sets it itself in its own configuration, under the old name.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.mark.parametrize("model_type", TINY_FAMILIES)
@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"full_finetuning": True}], ids=["nf4", "full"])
def test_a_notebook(
    load: Callable, tiny_run: Callable, rows_of: Callable, tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    from trl import SFTConfig, SFTTrainer

    model, processor = load(model_type, **options)
    if "full_finetuning" not in options:
        model = vlm.FastVisionModel.get_peft_model(model, r=8, modules_to_save=["lm_head"])
    vlm.FastVisionModel.for_training(model)
    rows = rows_of(tiny_run(model_type).dataset_dir)
    trainer = SFTTrainer(
        model=model,
        processing_class=processor,
        data_collator=vlm.VisionDataCollator(model, processor, train_on_responses_only=True),
        train_dataset=vlm.to_dataset(rows),
        args=SFTConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=6,
            learning_rate=5e-3,
            logging_steps=1,
            optim="adamw_8bit",
            bf16=vlm.is_bf16_supported(),
            fp16=not vlm.is_bf16_supported(),
            remove_unused_columns=False,
            dataset_text_field="",
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=2048,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {torch.float32}
    vlm.FastVisionModel.for_inference(model)
    question = processor.apply_chat_template(rows[0]["messages"][:1], add_generation_prompt=True)
    images, _ = vlm.process_vision_info(rows[0]["messages"])
    inputs = processor(images, question, add_special_tokens=False, return_tensors="pt").to("cuda")
    new = model.generate(**inputs, max_new_tokens=4, use_cache=True, do_sample=False)
    assert new.shape[1] > inputs["input_ids"].shape[1]
    model.save_pretrained_merged(tmp_path / "merged", processor)
    merged, _ = vlm.FastVisionModel.from_pretrained(str(tmp_path / "merged"), load_in_4bit=False)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected, found = model(**inputs).logits.float(), merged(**inputs).logits.float()
    # bfloat16 has 8 bits: each of a dozen layers rounds by up to 2^-9.
    assert (found - expected).norm() < 0.1 * expected.norm()
