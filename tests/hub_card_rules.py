"""What the Hub's `/api/validate-yaml` says of a model card's metadata, as far as its documents and messages tell.

The real validation is not public. These are the rules that https://huggingface.co/docs/hub/model-cards and
https://github.com/huggingface/hub-docs/blob/main/modelcard.md state, and those that people have met as errors. Where
the two leave it open, this is the stricter.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

_BLOCK = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
_REPO_ID = re.compile(r"^(?!.*(--|\.\.))[\w](?:[\w.-]{0,94}[\w])?(/[\w](?:[\w.-]{0,94}[\w])?)?$")
_LANGUAGE = re.compile(r"^([a-z]{2,3}|code|multilingual)$")
_LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr "
    "mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr "
    "deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma "
    "unknown other"
).split()
_TEXTS = ("library_name", "pipeline_tag", "license_name", "license_link", "license", "thumbnail", "model_name")
_LISTS = ("tags", "datasets", "metrics", "language", "base_model")


def card_problems(content: str) -> tuple[list[str], list[str]]:
    """Errors, for which the Hub refuses the card, and warnings."""
    block = _BLOCK.search(content)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block.group(2))
    except yaml.YAMLError as error:
        return [f"YAML: {error}"], []
    if not isinstance(data, dict):
        return ["the metadata must be an object"], []
    errors = [f'"{key}" must be a string' for key in _TEXTS if not isinstance(data.get(key, ""), str)]
    for key in _LISTS:
        value = data.get(key, [])
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            errors.append(f'"{key}" must be a string or an array of strings')
    if not isinstance(data.get("tags", []), list):
        errors.append('"tags" must be an array')
    errors += [f'"tags" with value "{tag}" is too long' for tag in _strings(data, "tags") if len(tag) > 96]
    if isinstance(data.get("license", "mit"), str) and data.get("license", "mit") not in _LICENSES:
        errors.append(f'"license" must be one of [{", ".join(_LICENSES)}]')
    for value in _strings(data, "language"):
        if not _LANGUAGE.match(value):
            errors.append(f'"language" with value "{value}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code')
    for value in _strings(data, "base_model"):
        if not _REPO_ID.match(value):
            errors.append(f'"base_model" with value "{value}" is not valid. Use a model id from https://hf.co/models')
    for value in _strings(data, "datasets"):
        if not _REPO_ID.match(value):
            errors.append(f'"datasets" with value "{value}" is not valid. Use a dataset id from https://hf.co/datasets')
    errors += _model_index_problems(data.get("model-index", []))
    return errors, []


def _strings(data: dict[str, Any], key: str) -> list[str]:
    value = data.get(key, [])
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [v for v in values if isinstance(v, str)]


def _model_index_problems(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    problems = []
    for i, model in enumerate(index):
        at = f"model-index[{i}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not model["name"]:
            problems.append(f'"{at}.name" is required')
            continue
        results = model.get("results")
        if not isinstance(results, list) or not results:
            problems.append(f'"{at}.results" is required')
            continue
        for j, result in enumerate(results):
            problems += _result_problems(result, f"{at}.results[{j}]")
    return problems


def _result_problems(result: Any, at: str) -> list[str]:
    problems = []
    for key, needed in (("task", ("type",)), ("dataset", ("type", "name"))):
        part = result.get(key) if isinstance(result, dict) else None
        for name in needed:
            if not isinstance(part, dict) or not isinstance(part.get(name), str) or not part[name]:
                problems.append(f'"{at}.{key}.{name}" is required')
    metrics = result.get("metrics") if isinstance(result, dict) else None
    if not isinstance(metrics, list) or not metrics:
        return [*problems, f'"{at}.metrics" is required']
    for k, metric in enumerate(metrics):
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str):
            problems.append(f'"{at}.metrics[{k}].type" is required')
        elif not isinstance(metric.get("value"), int | float | str | list | dict):
            problems.append(f'"{at}.metrics[{k}].value" is required')
        elif isinstance(metric["value"], float) and not math.isfinite(metric["value"]):
            problems.append(f'"{at}.metrics[{k}].value" must be finite')
    return problems
