import pytest

from trl_grpo_ext.objective import AGGREGATIONS, Choices


def test_lookup_returns_the_entry_and_lists_the_names():
    table = Choices("colour", {"red": 1, "blue": 2})
    assert table["blue"] == 2
    assert list(table) == ["red", "blue"]
    assert "green" not in table


def test_an_unknown_name_is_answered_with_the_setting_and_the_choices():
    with pytest.raises(ValueError, match=r"loss_type='drgrpo'.*'grpo', 'dr_grpo', 'bnpo', 'dapo'"):
        AGGREGATIONS["drgrpo"]
