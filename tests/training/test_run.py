"""`pgolf train` from end to end: what is left on disk, and that its numbers are true."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import sentencepiece
import torch

from bench import quality
from pgolf.artifact.container import read_artifact
from pgolf.cli import main
from pgolf.cli.sample import main as sample
from pgolf.config import Config, ModelConfig, from_dict
from pgolf.data.held_out import documents
from pgolf.data.shards import open_shard, write_shard
from pgolf.errors import ConfigError, DataError
from pgolf.model import GPT
from pgolf.scoring.job import Score, ScoreJob
from pgolf.scoring.windows import Sums
from pgolf.submission.script import build_script
from pgolf.training import run
from pgolf.training.finish import stopped_after_training
from pgolf.training.repack import settings
from pgolf.training.run_folder import RunFolder
from pgolf.training.session import Session

from .tiny import ONE_THREAD, ROOT, TINY, metrics, replaced


def test_run_folder(finished):
    """Every file is there and result.json states what the files weigh."""
    result = json.loads((finished / "result.json").read_text())
    assert result["bytes_model"] == (finished / "artifact").stat().st_size
    assert result["bytes_total"] == result["bytes_model"] + result["bytes_code"]
    assert sum(result["bytes_by_group"].values()) == result["bytes_model"]
    assert result["steps"] == 20 and result["tokens"] == 5120
    dtype = result["compute_dtype"]
    assert result["scored_by"] == {"ranks": 1, "device": "cpu", "dtype": dtype}
    assert result["corpus"] == "words" and result["recipe"] == "demo" and result["seed"] == 1337
    for key in ("commit", "torch", "triton", "driver", "device", "cpu_flags"):
        assert key in result["provenance"]
    assert result["audit"] == [], "every setting of the tiny model did something"
    phases = {name: row["seconds"] for name, row in result["phases"].items()}
    assert phases["training"] == result["train_seconds"]
    assert phases.pop("total") == pytest.approx(sum(phases.values()))
    assert phases.pop("compile") == 0 and min(phases.values()) > 0
    assert phases["calibration"] + phases["quantisation"] == pytest.approx(
        result["quantise_seconds"], abs=0.01
    )
    config = json.loads((finished / "config.json").read_text())
    assert config["model"]["layers"] == 3
    assert result["bytes_code"] == len(build_script(from_dict(config)).data)
    assert (finished / "report.html").stat().st_size > 1000
    assert not list(finished.rglob("*.tmp"))


def test_the_code_that_is_counted_trains_and_scores(finished):
    """Reports, recipes and the preparation of data are not in it."""
    modules = set(json.loads((finished / "result.json").read_text())["code_modules"])
    assert {"pgolf.scoring.job", "pgolf.model.gpt", "pgolf.scoring.bpb", "pgolf.ops.xsa"} <= modules
    assert {"pgolf.training.trainer", "pgolf.quant.gptq"} <= modules
    for name in modules:
        assert not name.startswith(("pgolf.report", "pgolf.recipes", "pgolf.cli"))
        assert name not in ("pgolf.data.prepare", "pgolf.data.fetch")


def test_score_is_that_of_the_decoded_bytes(finished, shards):
    """Recompute BPB from the artifact with a loop of its own over targets and bytes."""
    result = json.loads((finished / "result.json").read_text())
    artifact = read_artifact(finished / "artifact")
    model = GPT(ModelConfig(**artifact.meta["model"]), max_length=32)
    model.load_state_dict(artifact.state_dict(), strict=True)
    raw = np.fromfile(next(shards.glob("*_val_*.bin")), np.uint16)[512:].astype(int)
    tokens = raw[: min((len(raw) - 1) // 32 * 32, 640) + 1]
    sp = sentencepiece.SentencePieceProcessor(model_file=str(shards / "tokenizer.model"))

    def size(previous: int, target: int) -> int:
        piece = sp.id_to_piece(target)
        if sp.is_byte(target):
            return 1
        if sp.is_control(target) or sp.is_unknown(target):
            return 0
        space = piece.startswith("\u2581")
        follows_text = not (sp.is_control(previous) or sp.is_unknown(previous))
        return len(piece[space:].encode()) + (space and follows_text)

    nll = total = 0
    with torch.no_grad():
        for i in range(len(tokens) - 1):
            # the window of target i: the first that ends at or after it, in steps of 8
            start = max(math.ceil((i + 1 - 32) / 8) * 8, 0)
            window = torch.tensor(tokens[start : start + 33])[None]
            losses = model(window[:, :-1], window[:, 1:], last=32)[0]
            nll += losses[i - start].item()
            total += size(tokens[i], tokens[i + 1])
    assert result["val_bytes"] == total
    assert result["val_targets"] == len(tokens) - 1
    assert abs(result["val_bpb"] - nll / math.log(2) / total) < 1e-5


def test_training_learns_and_averages(finished):
    lines = metrics(finished)
    losses = [m["loss"] for m in lines if m["kind"] == "train"]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    assert any(m["kind"] == "event" and "late QAT on" in m["text"] for m in lines)
    assert [m["step"] for m in lines if m["kind"] == "val"] == [10, 20]


def test_deterministic_and_resumable(train, finished, tmp_path):
    """A second run writes the same bytes; one that is stopped and resumed does too."""
    out = tmp_path / "again"
    code, output = train(f"out={out}")
    assert code == 0, output
    assert metrics(out) == metrics(finished)
    assert (out / "artifact").read_bytes() == (finished / "artifact").read_bytes()

    # lose the end of the run, and half of what was kept last
    for name in ("artifact", "result.json", "report.html"):
        (out / name).unlink()
    kept = sorted((out / "checkpoints").iterdir())
    assert [k.name for k in kept] == ["step-0000015", "step-0000020"]
    state = kept[-1] / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    code, output = train(f"out={out}", "resume=true")
    assert code == 0, output
    assert "step-0000015, late QAT is on" in output
    assert "of training (5 steps of" in output, "what is left is said"
    assert metrics(out) == metrics(finished)
    assert (out / "artifact").read_bytes() == (finished / "artifact").read_bytes()

    code, output = train(f"out={out}", "resume=true", "matrix_lr=0.5")
    assert code == 2 and "optim.matrix_lr=0.03 then, 0.5 now" in output


def test_the_end_is_kept_and_metrics_resume_exactly(pgolf, train, finished, tmp_path):
    """No checkpoint is due at step 20: packing still has it. One is due as QAT goes on."""
    out = tmp_path / "end"
    code, output = train(f"out={out}", "checkpoint_every=7")
    assert code == 0, output
    packed = tmp_path / "packed"
    code, output = pgolf("pack", out, "--out", packed)
    assert code == 0, output
    assert packed.read_bytes() == (finished / "artifact").read_bytes()
    shutil.rmtree(out / "checkpoints" / "step-0000020")
    code, output = train(f"out={out}", "checkpoint_every=7", "resume=true")
    assert code == 0, output
    assert "step-0000014\n" in output and metrics(out) == metrics(finished)


def test_two_ranks_give_the_result_of_one(train_alone, finished, tmp_path):
    """Same global batch, same result within rounding; rank 0 alone writes.

    Here all codecs are tried, as by default: the smallest is what is decoded and scored.
    """
    out = tmp_path / "two"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "pgolf")
    code, output = train_alone(f"out={out}", "codec=auto", launcher=launcher)
    assert code == 0, output
    assert output.count("train_loss") == 20
    for one, two in zip(metrics(finished), metrics(out), strict=True):
        assert one["kind"] == two["kind"] and one["step"] == two["step"]
        if one["kind"] == "train":
            assert abs(one["loss"] - two["loss"]) < 2e-3
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2)
    a, b = (json.loads((f / "result.json").read_text()) for f in (finished, out))
    assert abs(a["val_bpb"] - b["val_bpb"]) < 2e-3
    assert a["val_targets"] == b["val_targets"] and a["val_bytes"] == b["val_bytes"]


def test_ctrl_c_keeps_the_run(pgolf, shards, finished, tmp_path):
    """SIGINT in the middle: a checkpoint, one line that says how to go on, and it does go on."""
    out = tmp_path / "stopped"
    words = [w for w in TINY if not w.startswith("checkpoint_every")]
    process = subprocess.Popen(
        [sys.executable, "-m", "pgolf", "train", "demo", f"data={shards}", f"out={out}", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ONE_THREAD,
    )
    for line in process.stdout:
        if line.startswith("step:2/"):
            process.send_signal(signal.SIGINT)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "stopped after step" in errors and "resume=true" in errors and "Traceback" not in errors
    assert not (out / "result.json").exists()
    program, *hint = shlex.split(errors.split("`")[1])
    code, output = pgolf(*hint)
    assert program == "pgolf" and code == 0, output
    assert (out / "artifact").read_bytes() == (finished / "artifact").read_bytes()


def test_stopped_while_scoring(finished, tmp_path, monkeypatch, capsys):
    """Training is over: the message says how to go on, and going on trains nothing."""
    out = tmp_path / "moved"
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    trained = json.loads((out / "config.json").read_text())["data"]["data"]
    words = ["train", "demo", *replaced(TINY, ("resume=true", f"out={out}", f"data={trained}"))]

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ScoreJob, "ask", stopped)
    assert main(words) == 143
    output, errors = capsys.readouterr()
    assert f"`pgolf train demo out={out} resume=true`" in errors and "training is done" in errors
    assert "going on from" in output and "train_loss" not in output
    assert not (out / "result.json").exists() and not list(tmp_path.glob(".*"))
    monkeypatch.setattr(ScoreJob, "ask", lambda job: Score({}, Sums(2.0, 1, 1), 0.0))
    assert main(words) == 0
    assert "train_loss" not in capsys.readouterr().out
    assert json.loads((out / "result.json").read_text())["steps"] == 20
    shutil.rmtree(out / "checkpoints")
    session = Session(Config(), None, None, RunFolder(out))
    stop = stopped_after_training(session, KeyboardInterrupt())
    assert "no checkpoint was kept" in str(stop) and stop.exit_code == 130


def test_nan_stops_with_the_step(train, tmp_path):
    out = tmp_path / "nan"
    code, output = train(
        f"out={out}",
        "matrix_lr=1e30",
        "embed_lr=1e30",
        "checkpoint_every=1",
        "log_every=20",
        "qat_start=1",
    )
    assert code == 2, output
    assert "Traceback" not in output
    good = [line for line in output.splitlines() if line.startswith("step:1/")]
    assert good and "was not finite at step 2" in output
    assert not (out / "result.json").exists()
    for kept in (out / "checkpoints").glob("step-*"):  # whatever was kept is loadable
        state = torch.load(kept / "state.pt", weights_only=True)
        assert all(t.isfinite().all() for t in state["model"].values())


def test_bad_input(train, tmp_path):
    """One clear line, exit code 2, nothing left behind."""
    out = tmp_path / "bad"
    cases = [
        (("layer=4",), "did you mean layers"),
        (("layers=0",), "layers=0: must be at least 1"),
        (("layers=two",), "layers=two: expected int"),
        (("kv_heads=3",), "heads=4 must be a multiple of kv_heads=3"),
        (("vocab_size=300",), "vocab_size=400"),
        (("batch_tokens=96", "micro_tokens=16"), "micro_tokens=16"),
        (("bits_overrides=blocks.9.*=8", "qat_start=1"), "matches no matrix"),
        (("device=cuda",), "no GPU"),
        (("max_tokens=0", "max_steps=0"), "no budget"),
        (("max_seconds=1e-6",), "max_seconds=1e-06 is too short: a step takes 0."),
    ]
    for words, message in cases:
        if words == ("device=cuda",) and torch.cuda.is_available():
            continue
        code, output = train(f"out={out}", *words)
        assert code == 2, output
        assert message in output and "Traceback" not in output, output
        assert not out.exists()


def test_a_held_out_document_is_not_trained_on(pgolf, shards, tmp_path, monkeypatch):
    folder, out = shutil.copytree(shards, tmp_path / "leaked"), tmp_path / "run"
    shard = folder / "words_train_000000.bin"
    place = next(documents(sorted(folder.glob("*_val_*"))))
    tokens, leaked = np.array(open_shard(shard, None)), np.concatenate(place.parts)
    write_shard(shard, np.concatenate([leaked, tokens])[: tokens.size])
    said = f"{shard}: the document of {leaked.size} tokens at position 0 is one of words_val_* too"
    words = "train", "demo", f"data={folder}", f"out={out}", *TINY
    code, output = pgolf(*words)
    assert code == 2 and said in output and "held_out=allow" in output and not out.exists()
    monkeypatch.setattr(run, "train", lambda *args: (_ for _ in ()).throw(ConfigError("enough")))
    code, output = pgolf(*words, "held_out=allow")
    assert f"warning: {said}" in output and output.endswith("error: enough\n")


def test_over_budget_is_an_error(pgolf, train, tmp_path):
    out = tmp_path / "big"
    code, output = train(f"out={out}", "budget=20000")
    assert code == 2 and "too large even with the coarsest steps" in output, output
    assert not (out / "result.json").exists()
    program, *hint = shlex.split(output[output.index("pack them with") :].split("`")[1])
    code, output = pgolf(*hint)
    assert program == "pgolf" and code == 0 and (out / "artifact").exists(), output
    limited = "budget_bytes=20000", "prune_to_fit=false", "fit_to_budget=false"
    code, output = train(f"out={tmp_path / 'off'}", *limited)
    assert code == 2 and "over the limit of 20,000" in output, output


def test_pruning_lands_under_the_budget(train, finished, tmp_path):
    total = json.loads((finished / "result.json").read_text())["bytes_total"]
    # zstd saves 2,100 bytes at one more code on the way there: a budget in that gap is not met.
    out = tmp_path / "pruned"
    code, output = train(f"out={out}", f"budget_bytes={total - 3000}", "fit_to_budget=false")
    assert code == 0, output
    result = json.loads((out / "result.json").read_text())
    assert total - 4000 < result["bytes_total"] <= total - 3000
    assert result["codes_pruned"] > 0


def test_no_space(train, tmp_path):
    """A full disk ends no training, is one clear error at the end, and leaves nothing half."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        code, output = train(f"out={small / 'run'}")
        assert code == 2, output
        assert "no space left" in output and "Traceback" not in output
        assert "training goes on" in output and "step:20/20 train_loss" in output
        errors = [line for line in output.splitlines() if line.startswith("pgolf: error")]
        assert len(errors) == 1 and "no space left" in errors[0]
        assert not list((small / "run").rglob("*.tmp"))
    finally:
        time.sleep(0.1)
        subprocess.run(["umount", str(small)], check=True)


def test_eval_pack_sample_verify(pgolf, finished, shards, tmp_path):
    """The other commands on a finished run."""

    def done(*words: object) -> str:
        code, output = pgolf(*words)
        assert code == 0, output
        return output

    result = json.loads((finished / "result.json").read_text())
    artifact = finished / "artifact"
    out = done("eval", finished, f"data={shards}")  # as the run was scored
    assert f"val_bpb {result['val_bpb']:.6f}" in out and "the run's own score\n" in out
    # shards alone, as the contest has them: the tokenizer is named by the run
    bare = tmp_path / "run"
    shutil.copytree(finished, bare)
    for shard in shards.glob("*.bin"):
        shutil.copy(shard, tmp_path)
    config = json.loads((bare / "config.json").read_text())
    config["data"] |= {"data": str(tmp_path), "tokenizer": str(bare / "tokenizer.model")}
    (bare / "config.json").write_text(json.dumps(config))
    assert f"val_bpb {result['val_bpb']:.6f}" in done("eval", bare / "artifact")
    out = done("eval", bare, "stride=32")
    assert f"own score is {result['val_bpb']:.6f}: " in out and "stride 8 there, 32 here" in out
    small = tmp_path / "small"
    budget = result["bytes_total"] - 10_000
    out = done("pack", finished, "--out", small, f"budget={budget}")
    assert re.search(r"expected to add [\d.]+ nats a token\n", out), "of the fit"
    assert re.search(
        r"quantisation adds [-\d.]+ ± [\d.]+ nats a token: loss [\d.]+ before, [\d.]+ after, "
        r"measured on [\d,]+ held-out tokens; expected to add [\d.]+\n", out,
    )  # fmt: skip
    assert "EMA" in out and "next coarser" in out
    total = int(re.search(r"= ([\d,]+) bytes of", out)[1].replace(",", ""))
    assert 0 <= budget - total < 2_000  # a step of one matrix
    with pytest.raises(ConfigError, match="give it once"):
        settings(finished, {"budget": "9", "budget_bytes": "9"})
    assert not settings(finished, {"budget": "9", "grid": "rows"})[1].artifact.fit_to_budget
    text = done("sample", artifact, "--prompt", "abc", "--tokens", "20")
    assert text.startswith("abc") and len(text) > 10
    assert done("sample", artifact, "--prompt", "abc", "--tokens", "20") == text
    assert "blocks.0.attn.c_q.weight" in done("verify", finished)
    with pytest.raises(DataError, match="use --tokenizer FILE"):
        sample(["--device", "cpu", str(small)])


@pytest.mark.slow
def test_every_way_to_quantise_is_scored(finished, tmp_path, capsys):
    file = tmp_path / "quality.jsonl"
    assert quality.main([str(finished), "--bits", "5", "--stride", "32", "--json", str(file)]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [x["method"] for x in lines] == [*quality.METHODS, *quality.UNIFORM]
    by_method = {x["method"]: x for x in lines}
    best = by_method["gptq, training text"]
    assert best["expected_loss"] < by_method["round to nearest"]["expected_loss"]
    for name in quality.UNIFORM:
        assert by_method[name]["bytes_model"] <= best["bytes_model"]
    assert "gptq, self-generated" in capsys.readouterr().out
