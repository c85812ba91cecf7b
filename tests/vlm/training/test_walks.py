"""A model whose walks are short does what it did."""

import torch

from vlm.training.walks import short_walks


def test_modes_and_gradients() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(3, 1)))
    model[0].weight.requires_grad_(False)
    model.eval()
    with short_walks(model):
        assert model.train() is model
        assert all(module.training for module in model.modules())
        model(torch.ones(1, 2)).sum().backward()
        assert model[1][1].weight.grad is not None
        model.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
        model.eval()
        assert not any(module.training for module in model.modules())
        model.train()
        assert all(module.training for module in model.modules())
    assert not {"train", "zero_grad"} & set(model.__dict__)


def test_a_mode_that_is_on_is_not_set_again() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3)).train()
    with short_walks(model):
        model[0].training = False
        model.train()
        assert not model[0].training
    model.train()
    assert model[0].training
