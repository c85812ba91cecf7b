"""Settings of step 3: where rows come from and how they become conversations."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, model_validator

from vlm.config.base import Section

BUILTIN_DATASET = "builtin"

SourceFormat = Literal["auto", "builtin", "parquet", "arrow", "jsonl", "csv", "imagefolder", "saved", "hub"]
Split = Literal["train", "validation", "test"]
BoxConvention = Literal["absolute", "normalized_1", "normalized_999", "normalized_1000"]
BoxTarget = Literal["auto", "absolute", "normalized_1", "normalized_999", "normalized_1000"]
BoxSource = Literal["none", "absolute", "normalized_1", "normalized_999", "normalized_1000"]


class SourceConfig(Section):
    """One place that rows come from."""

    path: str = Field(
        BUILTIN_DATASET,
        min_length=1,
        description="File, folder or glob on any fsspec address, a Hub dataset name (format 'hub'), or 'builtin' for rendered receipt lines.",
    )
    format: SourceFormat = Field("auto", description="'auto' goes by the path: its ending, or what the folder holds.")
    split: Split | None = Field(
        None,
        description="Puts every row of this source in that split; None lets `data.split` decide, or the names train/validation/test of its files.",
    )
    subset: str | None = Field(None, description="Configuration name of a Hub dataset.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub dataset.")
    max_rows: int | None = Field(None, ge=1, description="Takes only the first rows of this source (per file split).")

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: object) -> object:
        """Lets a plain string stand for a source with that path."""
        return {"path": value} if isinstance(value, str) else value


class ColumnMapping(Section):
    """Which column holds what. Columns not named here are carried along as metadata if they are plain values."""

    messages: str | None = Field(
        None,
        description="Column with ready conversations; then prompt, answer and system are not read. None takes 'messages' where it exists and no column holds answers.",
    )
    images: tuple[str, ...] | None = Field(
        None,
        description="Columns with images (one or a list each); None takes 'image' and 'images' where they exist, () means text only.",
    )
    prompt: str | None = Field(
        None,
        description="Column with the user's words; None takes 'prompt', 'question' or 'query' where one exists, else `data.prompt`.",
    )
    answer: str | None = Field(
        None,
        description="Column with the answer to learn; None takes 'text', 'answer', 'label' or 'answers' where one exists. Of a"
        " list, the most frequent answer is learnt.",
    )
    references: str | None = Field(
        None,
        description="Column with a list of all answers that count as right in evaluation; None takes the answer column where"
        " that holds lists.",
    )
    system: str | None = Field(None, description="Column with a system prompt.")
    id: str | None = Field(None, description="Column that names a row; None takes 'id', else numbers the rows.")
    group: str | None = Field(
        None, description="Column whose equal values must stay in one split; None takes 'group' where it exists."
    )


class SplitConfig(Section):
    """How rows without a split of their own are divided. Groups are never torn."""

    validation_fraction: float = Field(0.05, ge=0, lt=1, description="Share of groups held out for validation.")
    test_fraction: float = Field(0.1, ge=0, lt=1, description="Share of groups held out for the final evaluation.")
    seed: int = Field(0, ge=0, description="Changes which groups are held out.")

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> SplitConfig:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction {self.validation_fraction} + test_fraction {self.test_fraction} leave nothing to train on; keep their sum under 1"
            )
        return self


class BoxConfig(Section):
    """Boxes and points written in prompts and answers, which have to follow their image when it is resized."""

    source: BoxSource = Field(
        "none",
        description="How the rows give coordinates: in pixels of the original, upright image ('absolute'), or from 0 to 1, to 999"
        " or to 1000 of its sides. 'none' leaves all texts as they are.",
    )
    target: BoxTarget = Field(
        "auto",
        description="How the model is to give them: 'auto' is what its family is used to; 'absolute' is in pixels of the image"
        " as the model sees it.",
    )
    layout: Literal["xyxy", "xywh"] = Field(
        "xyxy", description="What four numbers under a key are: two corners, or a corner with width and height (COCO)."
    )
    # Not `keys`: a model with that attribute looks like a mapping, which Prefect would walk through.
    json_keys: tuple[str, ...] = Field(
        ("bbox", "bbox_2d", "box", "box_2d", "bounding_box", "point", "point_2d"),
        description="Keys of JSON in a text whose lists of numbers are coordinates, besides the models' own marks.",
    )
    on_outside: Literal["drop", "clip"] = Field(
        "drop",
        description="What happens to a row with a box that partly leaves its image: dropped, or the box clipped. Both are in"
        " the ledger.",
    )

    @model_validator(mode="after")
    def _nothing_without_a_source(self) -> BoxConfig:
        if self.source == "none":
            idle = [
                name
                for name, field in type(self).model_fields.items()
                if name != "source" and getattr(self, name) != field.default
            ]
            if idle:
                raise ValueError(
                    f"data.boxes.{idle[0]} has no effect while data.boxes.source is 'none'; say how the rows give coordinates"
                )
        return self


class PreparationConfig(Section):
    """Which processes and hosts step 3 runs on.

    The dataset is the same to the bit whatever these say, so they belong to no key.
    """

    num_processes: int | Literal["auto"] = Field(
        1,
        description="Processes of this machine that prepare rows; 1 works in the flow's own, in `runtime.num_workers` threads,"
        " 'auto' takes one process per core. Of several, each works in one thread, unless `runtime.num_workers` says more.",
    )
    dask_scheduler: str | None = Field(
        None,
        pattern=r"^\w+://\S+:\d+$",
        description="Address of a Dask scheduler, such as tcp://host:8786, whose workers prepare rows instead. They have to reach"
        " data, store and Prefect server at the addresses that they have here.",
    )

    @property
    def is_single(self) -> bool:
        """Whether one process does it all, in the flow's own process; 'auto' may come to that as well."""
        return self.num_processes == 1 and self.dask_scheduler is None

    @property
    def num_local_processes(self) -> int:
        """Processes of this machine, 'auto' settled: one per core that this process may use."""
        return len(os.sched_getaffinity(0)) if self.num_processes == "auto" else self.num_processes

    @model_validator(mode="after")
    def _one_way(self) -> PreparationConfig:
        if self.num_processes != "auto" and self.num_processes < 1:
            raise ValueError(f"num_processes {self.num_processes} must be at least 1, or 'auto'")
        if self.dask_scheduler is not None and self.num_processes != 1:
            raise ValueError(
                f"num_processes {self.num_processes} has no effect with dask_scheduler {self.dask_scheduler!r}, whose workers are"
                " started elsewhere; drop one of them"
            )
        return self


class DataConfig(Section):
    """The dataset: sources, columns, splits, and limits on images and lengths."""

    sources: tuple[SourceConfig, ...] = Field(
        (SourceConfig(),), min_length=1, description="Where rows come from; all sources together make one dataset."
    )
    columns: ColumnMapping = Field(ColumnMapping(), description="Which column holds what.")
    prompt: str = Field(
        "Transcribe the text in the image.", description="The user's words where a row has none of its own."
    )
    system: str | None = Field(
        None, description="System prompt of rows without their own; None leaves it to the model's chat template."
    )
    split: SplitConfig = Field(SplitConfig(), description="How rows without a split of their own are divided.")
    boxes: BoxConfig = Field(BoxConfig(), description="Coordinates in prompts and answers.")
    min_pixels: int | None = Field(
        None, ge=1, description="Smaller images are enlarged to this many pixels; None takes the model's own limit."
    )
    max_pixels: int | None = Field(
        None, ge=1, description="Larger images are shrunk to this many pixels; None takes the model's own limit."
    )
    max_video_frames: int = Field(
        16, ge=1, le=768, description="Most frames of a video; of longer ones, evenly spaced frames from first to last."
    )
    max_video_pixels: int = Field(602_112, ge=1, description="Larger frames of videos are shrunk to this many pixels.")
    video_as_images: bool = Field(
        False, description="Give a video's frames as images, one after the other, also to models that take no videos."
    )
    max_length_tokens: int | None = Field(
        None, ge=16, description="Longest conversation, image tokens included; None takes the model's context length."
    )
    on_too_long: Literal["drop", "shrink_images"] = Field(
        "drop",
        description="What happens to a conversation over the limit: dropped, or its images shrunk until it fits. Both are in the ledger.",
    )
    max_source_pixels: int = Field(
        100_000_000,
        ge=1,
        description="Images with more pixels than this in their header are dropped before they are decoded.",
    )
    max_dropped_fraction: float = Field(
        0.1, ge=0, le=1, description="Preparation fails when more than this share of the rows had to be dropped."
    )
    follow_links: bool = Field(
        False,
        description="Read images that symbolic links in a source's folder lead to outside of it; off, such rows are dropped.",
    )
    allow_urls: bool = Field(
        False, description="Fetch images that rows name by a remote address (http, s3, …); off, such rows are dropped."
    )

    distributed: PreparationConfig = Field(PreparationConfig(), description="Processes and hosts of step 3.")

    @model_validator(mode="after")
    def _sources_can_be_shared(self) -> DataConfig:
        for source in self.sources:
            if not self.distributed.is_single and any(link.startswith("memory://") for link in source.path.split("::")):
                raise ValueError(
                    f"the source {source.path!r} is in the memory of one process, and distributed has others read it; write it to a"
                    " file or a bucket, or leave num_processes at 1 and dask_scheduler out"
                )
        return self

    @model_validator(mode="after")
    def _ordered_limits(self) -> DataConfig:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}; swap them or drop one"
            )
        return self
