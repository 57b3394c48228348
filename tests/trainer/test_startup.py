"""What the trainer resolves before it starts."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate.utils import DistributedType

from trl_grpo_ext import GRPOConfig, startup


@pytest.fixture
def loaded(monkeypatch, make_model) -> list[dict[str, Any]]:
    """Keyword arguments that models were to be loaded with."""
    calls: list[dict[str, Any]] = []

    def load_model(model: str, init_kwargs: dict[str, Any], quantization_config: Any) -> Any:
        calls.append(init_kwargs)
        return make_model()

    monkeypatch.setattr(startup, "load_model", load_model)
    return calls


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        # One process leaves the choice to TRL's create_model_from_path
        (DistributedType.NO, {}),
        (DistributedType.MULTI_CPU, {}),
        # Every process would spread its copy over all GPUs: trl/trainer/grpo_trainer.py overrides it the same way
        (DistributedType.MULTI_GPU, {"device_map": None}),
        (DistributedType.DEEPSPEED, {"device_map": None}),
    ],
)
def test_several_gpus_have_a_whole_model_each(loaded, monkeypatch, tmp_path, processes, expected):
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    monkeypatch.setattr(args.distributed_state, "distributed_type", processes)
    startup.load_policy("some/model", args, None)
    assert loaded == [{"trust_remote_code": False} | expected]


def test_a_device_map_is_overridden_on_several_gpus_only(loaded, monkeypatch, tmp_path):
    init_kwargs = {"device_map": "auto", "dtype": "bfloat16"}
    settings = {"use_cpu": True, "bf16": False, "report_to": "none"}
    args = GRPOConfig(output_dir=str(tmp_path), model_init_kwargs=init_kwargs, **settings)
    for processes in (DistributedType.NO, DistributedType.MULTI_GPU):
        monkeypatch.setattr(args.distributed_state, "distributed_type", processes)
        startup.load_policy("some/model", args, None)
    assert [kwargs["device_map"] for kwargs in loaded] == ["auto", None]
    assert args.model_init_kwargs == init_kwargs == {"device_map": "auto", "dtype": "bfloat16"}
