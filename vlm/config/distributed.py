"""Settings of a training on several GPUs or machines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlm.config.base import Section


class DistributedConfig(Section):
    """On how many GPUs and machines step 5 runs.

    A step keeps its conversations whatever these say; only who computes what changes. So results are equal to rounding (with
    dropout: drawn anew), and numbers belong to no key: what one GPU has trained is not trained again on two, and a training that
    was interrupted on two goes on on one. The strategy 'fsdp2' is in the keys of the plan and the training: with a part of the
    model on each GPU there is room for other packs, and the plan is made for as many GPUs as there are then.
    """

    num_processes: int | Literal["auto"] = Field(
        1,
        description="Processes of this machine that train together, one per GPU; 'auto' takes every GPU that is there. On a"
        " CPU more than one is for trying things out.",
    )
    strategy: Literal["ddp", "fsdp2"] = Field(
        "ddp",
        description="'ddp' keeps a whole model on every GPU and sums gradients once per step; 'fsdp2' spreads the language"
        " model's layers, and what is trained with its optimiser, over all GPUs, and puts each layer together while it computes: for"
        " models that one GPU does not hold, and for full fine-tuning.",
    )
    num_machines: int = Field(
        1, ge=1, description="Machines that train together, each started with the same settings but `machine_rank`."
    )
    machine_rank: int = Field(
        0, ge=0, description="Number of this machine; machine 0 keeps checkpoints and publishes what was trained."
    )
    main_address: str | None = Field(
        None,
        pattern=r"^.+:\d+$",
        description="host:port of machine 0, free and reachable from all others; needed with more than one machine.",
    )
    timeout_seconds: float = Field(
        45.0,
        ge=1,
        description="A process for which the others wait so long within a step is taken for hung: the training ends with an"
        " error, and goes on from its last checkpoint when run again. Checkpoints, validation and a run's first step may take"
        " longer.",
    )

    @property
    def is_single(self) -> bool:
        """Whether one process does it all, in the flow's own process; 'auto' may come to that as well."""
        return self.num_processes == 1 and self.num_machines == 1

    @model_validator(mode="after")
    def _consistent(self) -> DistributedConfig:
        if self.num_processes != "auto" and self.num_processes < 1:
            raise ValueError(f"num_processes {self.num_processes} must be at least 1, or 'auto'")
        if self.machine_rank >= self.num_machines:
            raise ValueError(
                f"machine_rank {self.machine_rank} must be less than num_machines {self.num_machines}: machines count from 0"
            )
        if (self.main_address is None) != (self.num_machines == 1):
            raise ValueError(
                f"main_address {self.main_address!r} with num_machines {self.num_machines}: several machines need host:port of"
                " machine 0, a single one none"
            )
        if self.strategy == "fsdp2" and self.is_single:
            raise ValueError(
                "strategy 'fsdp2' has no effect on one process; raise num_processes (or set it to 'auto'), or leave it out"
            )
        return self
