"""Trackers: what W&B and TensorBoard were given is read back from what their own packages wrote; secrets are in none of it."""

import json
import math
import os
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from openrl_reason.config import parse_config, save_config, to_dict
from openrl_reason.errors import ConfigError, MissingDependencyError
from openrl_reason.observe.redact import is_secret_name, redact, redact_text, redact_values
from openrl_reason.observe.run_log import RunLog, read_records
from openrl_reason.observe.trackers import TrackConfig, Trackers, check_track, shorten

KEY = "0123456789abcdef" * 3
ROOT = Path(__file__).resolve().parents[2]


def environment(**variables):
    """Of a child process: with a key, and with a W&B service of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {**kept, "WANDB_API_KEY": KEY, "PYTHONPATH": str(ROOT), **variables}


def write(folder, track, steps, start=0, settings=None, close=True):
    """A run's log with an evaluation after every second step, as the trainer writes it."""
    folder.mkdir(exist_ok=True)
    trackers = Trackers(track, folder, start_step=start, settings=settings or {})
    log = RunLog(folder, total_steps=6, start_step=start, headline=("train/loss",), trackers=trackers)
    if start == 0:
        log.evaluation(0, {"eval/toy/pass@1": 0.0})
    for step in steps:
        log.rollouts([{"step": step, "source": "train", "prompt": f"p{step}", "response": f"key {KEY} \ud800" + "x" * 9000, "reward": 1.0,
                       "status": "ok", "parsed": "7", "gold": "7"} for _ in range(5)])  # fmt: skip
        log.train(step, {"train/loss": 1.0 / (step + 1), "train/kl": math.nan, "timing/step": 0.5})
        if step % 2:
            log.evaluation(step + 1, {"eval/toy/pass@1": step / 10, "timing/evaluate": 1.0})
    if close:
        log.close()
    return log


# ---- W&B, offline: its log is a LevelDB log of protocol buffers ---------------------------------------------------------------------------


def wandb_records(folder):
    """Records of all runs below a folder, in order of time."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(folder.glob("wandb/*run-*/*.wandb")):
        data, position, part = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            left = 32768 - position % 32768
            _, size, kind = struct.unpack("<IHB", data[position : position + 7])
            if left < 7 or not kind:
                position += left
                continue
            part += data[position + 7 : position + 7 + size]
            position += 7 + size
            if kind in (1, 4):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(part)
                part = b""
                yield record


def wandb_history(folder):
    rows = [{(item.key or "/".join(item.nested_key)): json.loads(item.value_json.replace("NaN", "null")) for item in record.history.item}
            for record in wandb_records(folder) if record.WhichOneof("record_type") == "history"]  # fmt: skip
    return sorted(rows, key=lambda row: row["_step"])


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Killed after step 3 (its W&B service gets no goodbye), resumed from a checkpoint after step 2, finished."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("wandb") / "run"
    code = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT / 'tests/observe')!r})\n"
        "from pathlib import Path\n"
        "from test_trackers import KEY, TRACK, write\n"
        "write(Path(sys.argv[1]), TRACK, range(4), settings={'lr': 0.1, 'reward': {'api_key': 'sk-1', 'url': 'http://me:pw1@host'}}, close=False)\n"
        "time.sleep(1.5)\nos.kill(os.getpid(), 9)"
    )
    env = environment()
    first = subprocess.run([sys.executable, "-c", code, str(folder), "--reward.api_key", KEY], env=env, capture_output=True, text=True)
    assert first.returncode == -9, first.stderr
    time.sleep(0.5)
    environ = pytest.MonkeyPatch()
    environ.setenv("WANDB_API_KEY", KEY)
    write(folder, TRACK, range(2, 6), start=2)
    environ.undo()
    return folder


TRACK = TrackConfig(wandb="offline", project="toy", group="g", tags=("a", "b"), rollout_rows=3, rollout_chars=200)


def test_a_killed_and_resumed_run_is_one_wandb_run_with_every_step_once(offline):
    rows = wandb_history(offline)
    train = [(row["step/train"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert train == [(step + 1, 1.0 / (step + 1)) for step in range(6)]
    evaluations = [(row["step/eval"], row["eval/toy/pass@1"]) for row in rows if "eval/toy/pass@1" in row]
    assert evaluations == [(0, 0.0), (2, 0.1), (4, 0.3), (6, 0.5)]
    runs = [record.run for record in wandb_records(offline) if record.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1 and runs[0].project == "toy" and runs[0].run_group == "g" and list(runs[0].tags) == ["a", "b"]
    assert runs[0].run_id == json.loads((offline / "wandb_run.json").read_text())["run_id"]


def test_every_metric_has_its_own_step_axis_and_a_nan_is_left_out(offline):
    axes = {record.metric.name: record.metric.step_metric for record in wandb_records(offline) if record.WhichOneof("record_type") == "metric"}
    assert axes["train/loss"] == axes["timing/step"] == "step/train" and axes["eval/toy/pass@1"] == axes["timing/evaluate"] == "step/eval"
    assert not any("train/kl" in row for row in wandb_history(offline))


def test_the_table_of_rollouts_is_bounded_in_rows_and_characters(offline):
    tables = [json.loads(path.read_text()) for path in offline.glob("wandb/*/files/media/table/rollouts/*.json")]
    assert len(tables) >= 6
    for table in tables:
        assert table["columns"] == ["prompt", "response", "reward", "status", "parsed", "gold"] and len(table["data"]) == 3
        assert all(len(row[1]) < 300 and "characters left out" in row[1] and row[2] == 1.0 for row in table["data"])


def test_no_secret_is_in_any_file_of_the_tracker_nor_the_command_line(offline):
    configs = {item.key: item.value_json for record in wandb_records(offline) for item in record.run.config.update}
    assert json.loads(configs["reward"]) == {"api_key": "***", "url": "http://***@host"} and configs["lr"] == "0.1"
    for path in (path for path in offline.glob("wandb*/**/*") if path.is_file()):
        content = path.read_bytes()
        for secret in (KEY, "sk-1", "pw1", "--reward.api_key"):
            assert secret.encode() not in content, (path, secret)
    assert KEY.encode() in (offline / "rollouts.jsonl").read_bytes()  # the run's own record is what the model said


def test_an_unreachable_server_is_said_once_and_the_run_is_kept_offline(tmp_path, capfd):
    pytest.importorskip("wandb")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests/observe')!r})\nimport wandb\nfrom pathlib import Path\nfrom test_trackers import *\n"
        "real = wandb.Settings\nwandb.Settings = lambda **kwargs: real(**{**kwargs, 'init_timeout': 2})\n"
        "write(Path(sys.argv[1]), TrackConfig(wandb='online'), range(2))"
    )
    env = environment(WANDB_BASE_URL="http://127.0.0.1:9")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "kept offline" in done.stderr and KEY not in done.stderr + done.stdout, done.stderr
    assert [row["train/loss"] for row in wandb_history(tmp_path / "run") if "train/loss" in row] == [1.0, 0.5]


def test_a_refused_key_is_an_error_before_the_start(tmp_path):
    pytest.importorskip("wandb")

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(401)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests/observe')!r})\nfrom pathlib import Path\nfrom test_trackers import *\n"
        "write(Path(sys.argv[1]), TrackConfig(wandb='online'), range(2))"
    )
    env = environment(WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=env, capture_output=True, text=True)
    server.shutdown()
    assert "ConfigError: --run.track.wandb online: the server refused" in done.stderr and "WANDB_API_KEY" in done.stderr, done.stderr
    assert KEY not in done.stderr + done.stdout and not (tmp_path / "run/metrics.jsonl").exists()


# ---- TensorBoard --------------------------------------------------------------------------------------------------------------------------


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    return accumulator.Reload()


def test_a_resumed_tensorboard_shows_every_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    track = TrackConfig(tensorboard=True, rollout_rows=2, rollout_chars=100)
    write(tmp_path / "run", track, range(4), settings={"token": "s3cret"})
    write(tmp_path / "run", track, range(2, 6), start=2)
    read = events(tmp_path / "run")
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(s + 1, pytest.approx(1 / (s + 1))) for s in range(6)]
    assert [(e.step, e.value) for e in read.Scalars("eval/toy/pass@1")] == [(0, 0.0), *((n, pytest.approx((n - 1) / 10)) for n in (2, 4, 6))]
    assert "train/kl" not in read.Tags()["scalars"]
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in read.Tensors("rollouts/train/text_summary")}
    assert set(texts) == set(range(1, 7)) and texts[4].count("**response**") == 2 and "p3" in texts[4] and len(texts[4]) < 1000
    assert b"s3cret" not in b"".join(path.read_bytes() for path in (tmp_path / "run/tensorboard").iterdir())


# ---- failures -----------------------------------------------------------------------------------------------------------------------------


def test_a_tracker_that_fails_is_said_once_and_counted_and_metrics_are_complete(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "run").mkdir()
    trackers = Trackers(TrackConfig(tensorboard=True), tmp_path / "run")
    log = RunLog(tmp_path / "run", total_steps=3, trackers=trackers)
    trackers._active[0]._writer = None  # the package breaks while the run goes on
    for step in range(3):
        log.train(step, {"train/loss": 1.0})
    log.close()
    log.close()
    records = read_records(tmp_path / "run/metrics.jsonl")
    assert [record.get("track/failures/tensorboard") for record in records] == [None, 1.0, 2.0]
    said = capsys.readouterr().out
    assert said.count("the tracker tensorboard failed") == 1 and "tensorboard: 4 calls failed" in said


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TrackConfig(wandb="on"), "--run.track.wandb is 'on'"),
        (TrackConfig(wandb="online"), "WANDB_API_KEY"),
        (TrackConfig(wandb="offline", project=""), "--run.track.project"),
        (TrackConfig(rollout_rows=-1), "--run.track.rollout_rows is -1"),
        (TrackConfig(rollout_chars=3), "--run.track.rollout_chars is 3"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_start(config, expected, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=expected):
        check_track(config)


@pytest.mark.parametrize("config", [TrackConfig(wandb="offline"), TrackConfig(tensorboard=True)])
def test_a_missing_package_is_named_with_its_install_line(config, monkeypatch):
    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        check_track(config)


# ---- redaction ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", "api_key wandb_api_key X-Api-Key apikey hf_token token PASSWORD client_secret Authorization access_tokens credentials".split()
)
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", "max_new_tokens num_tokens tokens_per_micro_batch pad_token eos_token input_key label_key lr keys".split())
def test_names_that_are_none(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see http://me:p%40ss@host:80/x?y=1", "see http://***@host:80/x?y=1"),
        ("git clone https://ghtoken@github.example/a", "git clone https://***@github.example/a"),
        ("http://h/p?a=1&token=abc&b=2#c", "http://h/p?a=1&token=***&b=2#c"),
        ("http://h/p?access_token=abc", "http://h/p?access_token=***"),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': '***'}"),
        ("authorization: Basic Zm9vOmJhcg==", "authorization: ***"),
        ("sent bearer eyJhbGciOi1.x in a header", "sent bearer *** in a header"),
        ("run --reward.api_key abc --policy.lr 1", "run --reward.api_key *** --policy.lr 1"),
        ("run --reward.api_key=abc", "run --reward.api_key=***"),
        ('{"password": "a b", "n": 1}', '{"password": ***, "n": 1}'),
        ("Server(api_key='x', url='u')", "Server(api_key=***, url='u')"),
        ("the bearer of good news", "the bearer of good news"),
        ("--sampling.max_new_tokens 5 and pad_token=7", "--sampling.max_new_tokens 5 and pad_token=7"),
    ],
)
def test_secrets_in_text(text, shown):
    assert redact_text(text) == shown


def test_values_of_secret_variables_are_hidden_wherever_they_stand(monkeypatch):
    for name, value in {"OPENAI_API_KEY": "sk-live/12345", "MY_SERVICE_TOKEN": "abcdefgh1", "DB_PASSWORD": "correct horse", "A_SECRET": "true",
                        "MONKEY": "innocent-value"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert redact_values("a sk-live/12345 b sk-live%2F12345 c abcdefgh1. correct horse, true innocent-value") == (
        "a *** b *** c ***. ***, true innocent-value"
    )
    assert redact({"args": ["--x", "abcdefgh1"], "n": (1, 2.0, None)}) == {"args": ["--x", "***"], "n": [1, 2.0, None]}


def test_redaction_takes_time_in_proportion_to_the_text():
    started = time.perf_counter()
    for piece in ("-", "a", "&", "--a.", "://", "bearer ", "?token=", "token", "x://y@", "=", "'password': '"):
        redact_text(piece * (300_000 // len(piece)))
    assert time.perf_counter() - started < 10


def test_a_saved_config_has_no_secret_and_reads_back(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "key-from-environment")
    config = Settings(url="http://u:p@h/?token=x", note="uses key-from-environment", inner=Inner(password="pw"), names=("a=b", "token=x"))
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert not any(secret in text for secret in ("u:p", "key-from-environment", "pw"))
    read = parse_config(Settings, ["--config", str(tmp_path / "config.yaml")], prog="test")
    assert read == Settings(url="http://***@h/?token=***", note="uses ***", inner=Inner(password="***"), names=("a=b", "token=x"))
    assert to_dict(config)["inner"] == {"password": "***"}


@dataclass(frozen=True)
class Inner:
    """Inner."""

    password: str = ""
    """A secret."""


@dataclass(frozen=True)
class Settings:
    """Settings."""

    url: str = ""
    """A URL."""
    note: str = ""
    """A note."""
    names: tuple[str, ...] = ()
    """Names."""
    inner: Inner = field(default_factory=Inner)
    """Inner."""


def test_a_long_text_keeps_its_ends():
    assert shorten("a" * 100, 100) == "a" * 100
    short = shorten("a" * 60 + "b" * 60, 100)
    assert short.startswith("a" * 50) and short.endswith("b" * 50) and "20 characters left out" in short
