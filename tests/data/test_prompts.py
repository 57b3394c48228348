"""Prompts as token ids, completions as rewards read them, and datasets that are refused."""

import copy

import pytest
from datasets import Dataset, IterableDataset
from tokenizers.processors import TemplateProcessing

from trl_grpo_ext.data import EncodedPrompt, PromptEncoder, batched, check_columns, check_prompts

TEMPLATE = (
    "{{ bos_token }}{% if system is defined %}[{{ system }}]{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking is defined and thinking %}{{ '<think>\\n' }}{% endif %}"
    "{% if thinking is defined and not thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
USER = {"role": "user", "content": "2+2"}


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """Adds a BOS to what it tokenizes, as Llama's does, and writes one in its template."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def encoder(tokenizer):
    return PromptEncoder(tokenizer)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_plain_text_gets_the_special_tokens(encoder, tokenizer):
    assert encoder.text("ab") == "ab"
    assert encoder.encode("ab") == EncodedPrompt([tokenizer.bos_token_id, *ids_of(tokenizer, "ab")], "")


def test_a_template_writes_its_own(encoder, tokenizer):
    text = "<bos><|user|>2+2\n<|assistant|>"
    assert encoder.text([USER]) == text
    ids = encoder.encode([USER]).ids
    assert ids == ids_of(tokenizer, text)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_template_arguments_reach_the_template(tokenizer):
    arguments = {"system": "be brief"}
    encoder = PromptEncoder(tokenizer, arguments)
    arguments["system"] = "changed"  # the encoder has a copy
    assert encoder.text([USER]) == "<bos>[be brief]<|user|>2+2\n<|assistant|>"


def test_a_last_message_of_the_assistant_is_continued(encoder, tokenizer):
    prompt = [USER, {"role": "assistant", "content": "It is"}]
    assert encoder.text(prompt) == "<bos><|user|>2+2\n<|assistant|>It is"
    assert encoder.encode(prompt).ids == ids_of(tokenizer, "<bos><|user|>2+2\n<|assistant|>It is")
    assert encoder.encode(prompt).prefill == ""
    # ... and an earlier one is not
    prompt.append({"role": "user", "content": "why"})
    assert encoder.text(prompt).endswith("It is\n<|user|>why\n<|assistant|>")


SAYS = {"role": "user", "content": "Write <think>your thoughts</think>, starting with <think>"}
PREFILLS = {
    # prompt, template arguments, what was already written of the completion
    "opened by the template": ([USER], {"thinking": True}, "<think>\n"),
    "closed by the template": ([USER], {"thinking": False}, ""),
    "not opened": ([USER], {}, ""),
    "spoken of by the user": ([SAYS], {}, ""),
    "spoken of, and opened": ([SAYS], {"thinking": True}, "<think>\n"),
    "opened in a continued message": (
        [USER, {"role": "assistant", "content": "<think>First, 2"}],
        {},
        "<think>First, 2",
    ),
    "opened again in a continued message": (
        [USER, {"role": "assistant", "content": "<think>a</think>b<think>c"}],
        {},
        "<think>c",
    ),
    "closed in a continued message": ([USER, {"role": "assistant", "content": "<think>a</think>b"}], {}, ""),
    "opened in an earlier message": ([USER, {"role": "assistant", "content": "<think>a"}, USER], {}, ""),
    "opened by a plain prompt": ("2+2?\n<think>", {}, "<think>"),
    "opened by a plain prompt, with white space": ("2+2?\n<think> \n", {}, "<think> \n"),
    "closed by a plain prompt": ("2+2?\n<think></think>", {}, ""),
    "spoken of in a plain prompt": ("Use <think> and </think> tags: 2+2?", {}, ""),
    "an open tag in the middle of a plain prompt": ("Begin with <think>. 2+2?", {}, ""),
}


@pytest.mark.parametrize(("prompt", "arguments", "prefill"), PREFILLS.values(), ids=PREFILLS)
def test_reasoning_that_the_prompt_opened_is_part_of_the_completion(tokenizer, prompt, arguments, prefill):
    encoder = PromptEncoder(tokenizer, arguments)
    encoded = encoder.encode(prompt)
    assert encoded.prefill == prefill
    completion = [*ids_of(tokenizer, "4</think>"), tokenizer.eos_token_id]
    (seen,) = encoder.completions([prompt], [encoded.prefill], [completion])
    text = prefill + "4</think>"
    assert seen == (text if isinstance(prompt, str) else [{"role": "assistant", "content": text}])


def test_completions_keep_order_and_form(encoder, tokenizer):
    ids = [[*ids_of(tokenizer, text), tokenizer.eos_token_id] for text in ("one", " two ", "<b>")]
    found = encoder.completions(["a", [USER], "b"], ["", "<think>", ""], ids)
    assert found == ["one", [{"role": "assistant", "content": "<think> two "}], "<b>"]


def test_every_prompt_needs_its_prefill(encoder):
    with pytest.raises(ValueError, match="zip"):
        encoder.completions(["a", "b"], [""], [[5], [6]])


# --- datasets ---


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("lazy", [False, True])
def test_rows_in_lists(lazy):
    rows = [{"prompt": str(i)} for i in range(5)]
    dataset = stream(rows) if lazy else Dataset.from_list(rows)
    assert list(batched(dataset, 2)) == [rows[:2], rows[2:4], rows[4:]]
    assert list(batched(dataset, 5)) == [rows]
    assert list(batched(dataset, 7)) == [rows]


@pytest.mark.parametrize("prompt", ["text", [USER], [USER, {"role": "assistant", "content": "It"}]])
@pytest.mark.parametrize("lazy", [False, True])
def test_good_datasets_pass(prompt, lazy):
    rows = [{"prompt": prompt, "answer": 4}] * 2
    check_columns(stream(rows) if lazy else Dataset.from_list(rows), "train_dataset")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train_dataset is empty"),
        ([{"question": "a", "answer": 4}], r"no 'prompt' column \(its columns: \['answer', 'question'\]\)"),
        ([{"prompt": 5}], "'prompt' of the first row is 5; it must be a string or a list of messages"),
        ([{"prompt": ["a", "b"]}], "it must be a string or a list of messages"),
        ([{"prompt": []}], "it must be a string or a list of messages"),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_datasets_without_prompts_are_refused(rows, message, lazy):
    with pytest.raises(ValueError, match=message):
        check_columns(stream(rows) if lazy else Dataset.from_list(rows), "train_dataset")


def test_something_else_than_a_dataset_is_refused():
    with pytest.raises(TypeError, match=r"eval_dataset must be a datasets\.Dataset or IterableDataset, got list"):
        check_columns([{"prompt": "a"}], "eval_dataset")


def test_prompts_that_are_too_long_are_refused_by_row(encoder):
    # A byte is a token, and BOS is one more
    dataset = Dataset.from_list([{"prompt": "a" * n} for n in (3, 1999, 2000, 5, 2500)])
    check_prompts(dataset, "train_dataset", encoder, 2501, "of the test")
    with pytest.raises(ValueError, match=r"prompt of row 4 has 2501 tokens, more than the 2500 of the test; 1 of 5"):
        check_prompts(dataset, "train_dataset", encoder, 2500, "of the test")
    with pytest.raises(ValueError, match=r"train_dataset: the prompt of row 2 has 2001 tokens, .*; 2 of 5 .*filter"):
        check_prompts(dataset, "train_dataset", encoder, 2000, "of the test")


def test_what_the_template_writes_counts(encoder):
    dataset = Dataset.from_list([{"prompt": [USER]}])
    length = len(encoder.encode([USER]).ids)
    assert length > 20
    check_prompts(dataset, "train_dataset", encoder, length, "")
    with pytest.raises(ValueError, match=f"row 0 has {length} tokens"):
        check_prompts(dataset, "train_dataset", encoder, length - 1, "")


def test_bytes_are_counted_and_not_characters(encoder):
    text = "é" * 1500  # 3,000 bytes, and as many tokens here
    for prompt in (text, [{"role": "user", "content": text}]):
        with pytest.raises(ValueError, match=r"row 0 has 30\d\d tokens"):
            check_prompts(Dataset.from_list([{"prompt": prompt}]), "train_dataset", encoder, 2600, "")


def test_short_prompts_are_not_tokenized(tokenizer):
    """Screening a large dataset must cost nothing where the context is long."""

    class Counting(PromptEncoder):
        calls = 0

        def encode(self, prompt):
            Counting.calls += 1
            return super().encode(prompt)

    dataset = Dataset.from_list([{"prompt": "a" * 100}] * 3 + [{"prompt": "a" * 4000}])
    check_prompts(dataset, "train_dataset", Counting(tokenizer), 4096, "")
    assert Counting.calls == 2  # the first, to see that it can be read, and the long one
