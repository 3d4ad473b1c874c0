"""report.html: a run on one page, in one file that loads nothing.

It has a header with the result, the figures of `figures`, what ran where, and, folded away, the
full configuration and the table of tensors. A content security policy forbids scripts and network
access.
"""

from collections.abc import Iterable
from pathlib import Path
from shlex import quote
from typing import Any

from pgolf.config import from_dict
from pgolf.errors import ConfigError
from pgolf.files import atomic_write
from pgolf.progress import format_seconds
from pgolf.recipes import changes, get, run_name
from pgolf.report.figures import all_figures
from pgolf.report.format import (
    GROUPS,
    MISSING,
    NOT_COMPARABLE,
    decimal,
    percent,
    quantisation_cost,
    si,
    stored_as,
)
from pgolf.report.markup import Markup, join, tag
from pgolf.report.page_style import STYLE
from pgolf.report.plots import short
from pgolf.report.read import RunFiles, mapping, number, objects, read_run

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def _value(value: Any) -> str:
    """A value of a JSON file as text."""
    if value is None or value == "":
        return MISSING if value is None else "(empty)"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(_value, value)) if isinstance(value, list) else str(value)


def _facts(title: str, facts: Iterable[tuple[str, str]]) -> Markup:
    rows = (join((tag("dt", name), tag("dd", value))) for name, value in facts)
    return tag("div", tag("h2", title), tag("dl", *rows), class_="card")


def _tile(name: str, value: str, note: str = "", style: str | None = None) -> Markup:
    small = tag("small", note, class_=style) if note else ""
    return tag("div", tag("dt", name), tag("dd", value, small))


def _size_tile(result: dict[str, Any]) -> Markup:
    total, budget = number(result.get("bytes_total")), number(result.get("budget_bytes"))
    if total is None or not budget:
        return _tile("code + model", f"{decimal(total, 0)} B", "no budget")
    left = budget - total
    if left < 0:
        return _tile("code + model", f"{decimal(total, 0)} B", f"{decimal(-left, 0)} B over", "bad")
    return _tile("code + model", f"{decimal(total, 0)} B",
                 f"{decimal(left, 0)} B headroom", "good")


def _lead(result: dict[str, Any]) -> Markup:
    """The score and the figures beside it."""
    seconds = number(result.get("train_seconds"))
    tiles = [
        _tile("live weights", decimal(result.get("val_bpb_live"), 4), "bits per byte"),
        _tile("lost in quantisation", percent(quantisation_cost(result), 2, sign=True),
              "decoded against live"),
        _size_tile(result),
        _tile("parameters", decimal(result.get("parameters"), 0)),
        _tile("training", MISSING if seconds is None else format_seconds(seconds),
              f"{decimal(result.get('steps'), 0)} steps, {si(result.get('tokens'))} tokens"),
        _tile("tokens/s", decimal(result.get("tokens_per_second"), 0),
              f"{decimal(result.get('ms_per_step'), 1)} ms/step"),
    ]
    tiles += [
        _tile(name, decimal(mapping(baseline).get("bpb"), 4), "on the same bytes")
        for name, baseline in mapping(result.get("baselines")).items()
    ]
    score = tag("div", tag("span", "validation, decoded artifact"),
                tag("strong", decimal(result.get("val_bpb"), 4)),
                tag("span", "bits per byte, lower is better"), class_="score")
    return tag("section", score, tag("dl", *tiles, class_="tiles"), class_="card lead")


def _over_budget(result: dict[str, Any]) -> Markup:
    total, budget = number(result.get("bytes_total")), number(result.get("budget_bytes"))
    if total is None or not budget or total <= budget:
        return Markup()
    message = f"Over the budget by {decimal(total - budget, 0)} bytes: this is not a valid entry."
    return tag("p", message, class_="card notice bad", role="alert")


def _run_facts(run: RunFiles) -> Markup:
    result, config = run.result, run.config
    score = [
        ("corpus", _value(result.get("corpus"))),
        ("corpus sha256", short(_value(result.get("corpus_sha256")), 17)),
        ("tokenizer sha256", short(_value(result.get("tokenizer_sha256")), 17)),
        ("held out", f"{decimal(result.get('val_bytes'), 0)} bytes, "
                     f"{decimal(result.get('val_targets'), 0)} tokens"),
        ("window", f"{decimal(result.get('seq_len'), 0)} tokens, "
                   f"stride {decimal(result.get('stride'), 0)}"),
        ("validation loss", f"{decimal(result.get('val_loss'), 4)} nats per token"),
        ("exported weights", _value(result.get("exported_weights"))),
    ]
    chosen = {
        "model": ("layers", "dim", "heads", "kv_heads", "mlp_hidden", "activation", "vocab_size"),
        "data": ("seq_len", "batch_tokens"),
        "optim": ("matrix_lr", "embed_lr", "scalar_lr"),
        "quant": ("attn_bits", "mlp_bits", "tok_bits", "qat_start"),
    }
    settings = [(name, _value(result.get(name))) for name in ("recipe", "seed", "as_published")]
    settings += [
        (name, _value(mapping(config.get(section)).get(name)))
        for section, names in chosen.items()
        for name in names
    ]
    where = [("compute_dtype", _value(result.get("compute_dtype")))]
    where += [("attention", _value(mapping(result.get("ops")).get("attention")))]
    where += [(name, _value(value)) for name, value in mapping(result.get("provenance")).items()]
    return tag("section", _facts("Data and score", score), _facts("Settings", settings),
               _facts("Where it ran", where), class_="facts")


def _rows_table(rows: Iterable[tuple[str, Any]], caption: str) -> Markup:
    body = (tag("tr", tag("th", name, scope="row"), tag("td", _value(v))) for name, v in rows)
    return tag("table", tag("caption", caption), tag("tbody", *body))


def _config_tables(config: dict[str, Any]) -> Markup:
    plain = [(name, value) for name, value in config.items() if not isinstance(value, dict)]
    sections = [(name, value) for name, value in config.items() if isinstance(value, dict)]
    return join(_rows_table(values, name) for name, values in
                [("run as a whole", plain), *((name, v.items()) for name, v in sections)] if values)


def _tensor_table(tensors: list[dict[str, Any]]) -> Markup:
    heads = ("tensor", "group", "stored as", "shape")
    numbers = ("relative error", "rows at the step's floor")
    head = tag("tr", *(tag("th", h, scope="col") for h in heads),
               *(tag("th", h, scope="col", class_="number") for h in numbers))
    rows = []
    for t in tensors:
        shape = t.get("shape")
        size = " × ".join(map(str, shape)) if isinstance(shape, list) and shape else "scalar"
        group = _value(t.get("group"))
        cells = (_value(t.get("name")), GROUPS.get(group, group), stored_as(t), size)
        rows.append(tag(
            "tr",
            *(tag("td", cell) for cell in cells),
            tag("td", percent(t.get("relative_error"), 3), class_="number"),
            tag("td", percent(t.get("floor_share"), 1), class_="number"),
        ))
    return tag("table", tag("thead", head), tag("tbody", *rows))


def _folded(title: str, note: str, inside: Markup, columns: bool = False) -> Markup:
    return tag("details", tag("summary", title, " ", tag("span", note)),
               tag("div", inside, class_="inside columns" if columns else "inside"))


def _title_and_text(run: RunFiles) -> tuple[str, Markup]:
    """A run's name, and its recipe's title or, if it has changed settings, these."""
    try:
        config = from_dict(run.config)
        changed, recipe = changes(config), get(config.recipe)
    except ConfigError:  # of another version
        return _value(run.result.get("recipe")), Markup()
    if not changed:
        return run_name(config), tag("p", recipe.title, class_="under")
    items = (tag("li", f"{key}={_value(own)} ", tag("small", f"not {_value(original)}"))
             for key, own, original in changed)
    return run_name(config), tag("ul", *items, class_="changed", aria_label="changed settings")


def _page(run: RunFiles) -> Markup:
    result = run.result
    name, what = _title_and_text(run)
    tensors, files = objects(result.get("tensors")), result.get("code_modules")
    files = files if isinstance(files, list) else []
    under = (f"seed {_value(result.get('seed'))} · corpus {_value(result.get('corpus'))} · "
             f"commit {short(_value(mapping(result.get('provenance')).get('commit')), 13)}")
    main = tag(
        "main",
        tag("header", tag("h1", name), what, tag("p", under, class_="under")),
        _over_budget(result),
        _lead(result),
        tag("section", all_figures(run), class_="charts"),
        _run_facts(run),
        tag(
            "section",
            _folded("Configuration", "every setting of the run", _config_tables(run.config), True),
            _folded("Tensors", f"{len(tensors)} in the artifact", _tensor_table(tensors)),
            _folded("Code", f"{len(files)} modules in the submission's script of "
                    f"{decimal(result.get('bytes_code'), 0)} bytes",
                    join(tag("p", name) for name in files), True),
            class_="more",
        ),
        tag("p", NOT_COMPARABLE, class_="foot"),
    )
    head = tag(
        "head", tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{name} · {decimal(result.get('val_bpb'), 4)} bits per byte"),
        tag("style", Markup(STYLE)),
    )
    return join((Markup("<!doctype html>\n"), tag("html", head, tag("body", main), lang="en")))


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder that holds config.json, metrics.jsonl and result.json.

    Returns:
        The path of the page.

    Raises:
        ConfigError: matplotlib does not load.
        DataError: a file is missing or damaged; the message names the file and the line.
        StorageError: the page could not be written.
    """
    run = Path(run)
    path = run / "report.html"
    atomic_write(path, _page(read_run(run)) + "\n")
    return path


def report_line(run: Path) -> str:
    """Write the page that ends a run; returns its path, or one line that says how to get it.

    Everything else of the run is written and shown by then: a missing library must not fail it.
    """
    try:
        return str(write_report(run))
    except ConfigError as e:
        return f"no report.html: {e}, then python -m pgolf.report {quote(str(run))}"
