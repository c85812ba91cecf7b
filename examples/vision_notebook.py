# ruff: noqa: T201
"""Fine-tuning in a notebook's steps: load, adapt, train with TRL, ask, save.

As it stands it takes a minute on a CPU: the built-in model, which reads plain lines, learns to read the built-in receipts
through boxes and hatching. For work, give a real model's name and your own images.
"""

# %% Names that vision notebooks use; only where they come from is different.
import os
from pathlib import Path
from typing import Any

from transformers import TextStreamer
from trl import SFTConfig, SFTTrainer

from vlm import FastVisionModel, VisionDataCollator, is_bf16_supported, to_dataset
from vlm.data.builtin import builtin_rows

NUM_STEPS = int(os.environ.get("NUM_STEPS", "24"))
OUTPUT = Path(os.environ.get("OUTPUT", "runs/notebook"))

# %% The model: on a GPU, NF4 ("load_in_4bit") takes a quarter of the memory.
model, processor = FastVisionModel.from_pretrained(
    "builtin",  # or "Qwen/Qwen2.5-VL-7B-Instruct", or a folder
    load_in_4bit=False,
    use_gradient_checkpointing=False,
)

# %% What learns.
model = FastVisionModel.get_peft_model(
    model,
    finetune_vision_layers=True,
    finetune_language_layers=True,
    finetune_attention_modules=True,
    finetune_mlp_modules=True,
    r=16,
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)
model.print_trainable_parameters()

# %% The data: one conversation per row, images as they are.
INSTRUCTION = "Transcribe the text in the image."


def convert_to_conversation(sample: dict[str, Any]) -> dict[str, Any]:
    """A row of a dataset as a conversation."""
    question = [{"type": "text", "text": INSTRUCTION}, {"type": "image", "image": sample["image"]}]
    answer = [{"type": "text", "text": sample["text"]}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


samples = list(builtin_rows())
rows = [convert_to_conversation(sample) for sample in samples[:256]]

# %% Training.
FastVisionModel.for_training(model)
trainer = SFTTrainer(
    model=model,
    processing_class=processor,
    data_collator=VisionDataCollator(model, processor, train_on_responses_only=True),
    train_dataset=to_dataset(rows),  # a plain list is no dataset to TRL
    args=SFTConfig(
        output_dir=str(OUTPUT / "checkpoints"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        warmup_steps=5,
        max_steps=NUM_STEPS,
        learning_rate=2e-3,
        logging_steps=5,
        optim="adamw_torch",  # "adamw_8bit" on a GPU
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        bf16=is_bf16_supported(),
        save_strategy="no",
        report_to="none",
        # What an own collator for images needs.
        remove_unused_columns=False,
        dataset_text_field="",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=2048,
    ),
)
trainer_stats = trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {trainer_stats.metrics['train_runtime']:.0f} s")

# %% Asking the tuned model.
FastVisionModel.for_inference(model)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]}]
input_text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(samples[-1]["image"], input_text, add_special_tokens=False, return_tensors="pt").to(model.device)
print(f"written on the image: {samples[-1]['text']}")
text_streamer = TextStreamer(processor, skip_prompt=True)
_ = model.generate(**inputs, streamer=text_streamer, max_new_tokens=32, use_cache=True, do_sample=False)

# %% Saving: the adapter, and a whole model that plain transformers loads.
model.save_pretrained(OUTPUT / "lora")
processor.save_pretrained(OUTPUT / "lora")
model.save_pretrained_merged(OUTPUT / "merged", processor, save_method="merged_16bit")

# %% And back.
model, processor = FastVisionModel.from_pretrained(str(OUTPUT / "lora"), load_in_4bit=False)
FastVisionModel.for_inference(model)
again = model.generate(**inputs, max_new_tokens=32, use_cache=True, do_sample=False)
print("reloaded:", processor.decode(again[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
