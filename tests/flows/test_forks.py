"""Workers of a data loader in a process where a flow has run."""

import torch
from prefect import flow

import flows  # noqa: F401  what is tested


class Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, place: int) -> int:
        return place


def read() -> tuple[list[int], int | None]:
    """What a worker gives, and its exit status."""
    batches = iter(torch.utils.data.DataLoader(Numbers(), batch_size=None, num_workers=1))
    (worker,) = batches._workers  # type: ignore[attr-defined]
    found = list(batches)
    worker.join(10)
    return found, worker.exitcode


def test_workers_of_a_data_loader_end_well(prefect_server: None) -> None:
    within = flow(read)()
    assert within == ([0, 1, 2], 0)
    assert read() == ([0, 1, 2], 0)
