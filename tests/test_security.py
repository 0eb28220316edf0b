"""The audit: no code from files, no pickles, no port beyond this machine, no secret where it can be read. docs/security.md says what this covers."""

import ast
import dataclasses
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from openrl_reason import cli
from openrl_reason.config import parse_config, save_config, to_dict
from openrl_reason.environment import runtime_variables
from openrl_reason.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "openrl_reason").rglob("*.py"), *(ROOT / "examples/python").glob("*.py")])

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_IMPORTS = {"parse_expr", "sympify", "ExprExtractionConfig"}  # the last is math-verify's way to the first, which is eval
FORBIDDEN_CALLS = {
    "os.system", "os.popen", "parse_expr", "sympify", "ExprExtractionConfig", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all",
    "numpy.load", "np.load", "pandas.read_pickle", "pd.read_pickle", "getoutput", "getstatusoutput",
}  # fmt: skip

ALLOWED: dict[tuple[str, str], str] = {
    ("openrl_reason/workers/deepspeed_engine.py", "TCPStore that may listen on every interface"): (
        "only without a store; model groups of a run always bring one that listens on their node's address"
    ),
    ("openrl_reason/workers/network.py", "TCPStore that may listen on every interface"): "listens on the socket it is given, bound to one address",
}
"""(file, finding) -> why it is no danger. An entry that no longer matches anything fails the test."""


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or an attribute."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def constant(call: ast.Call, name: str):
    """The value of a keyword argument, if it is written as a constant."""
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def check_call(call: ast.Call):
    name = dotted(call.func)
    last = name.rpartition(".")[2]
    keywords = {keyword.arg for keyword in call.keywords}
    if name in FORBIDDEN_NAMES or name in FORBIDDEN_CALLS or (last in FORBIDDEN_CALLS):
        yield f"{name}()"
    if last == "load" and name.startswith("torch") and constant(call, "weights_only") is not True:
        yield "torch.load without weights_only=True"
    if constant(call, "allow_pickle") is True:
        yield "allow_pickle=True"
    if constant(call, "shell") is True:
        yield "shell=True"
    if constant(call, "trust_remote_code") is True:
        yield "trust_remote_code=True"
    if last == "TCPStore" and not (isinstance(constant(call, "is_master"), bool) and not constant(call, "is_master")):
        yield "TCPStore that may listen on every interface"
    if name == "ray.init" and "address" not in keywords:
        yield "ray.init without an address"
    if last == "bind" and call.args and isinstance(call.args[0], ast.Tuple) and isinstance(call.args[0].elts[0], ast.Constant):
        if call.args[0].elts[0].value in ("", "0.0.0.0", "::"):
            yield "a socket bound to every interface"


def findings(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if alias.name.partition(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {node.module.partition(".")[0], *(alias.name for alias in node.names)}
            yield from (f"from {node.module} import" for name in names & (FORBIDDEN_MODULES | FORBIDDEN_IMPORTS))
        elif isinstance(node, ast.Call):
            yield from check_call(node)
        elif isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::"):
            yield "the address of every interface"
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "trust_remote_code":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield "trust_remote_code is not off by default"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            with_default = zip(node.args.args[::-1], node.args.defaults[::-1], strict=False)
            for argument, default in [*with_default, *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]:
                if argument.arg == "trust_remote_code" and isinstance(default, ast.Constant) and default.value is not False:
                    yield "trust_remote_code is not off by default"


def test_no_pickle_no_eval_no_shell_no_open_port_in_the_code():
    found = {(str(path.relative_to(ROOT)), what) for path in SOURCES for what in findings(ast.parse(path.read_text()))}
    assert not found - ALLOWED.keys()
    assert not ALLOWED.keys() - found, "these exceptions are not needed any more"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from dill import loads", "eval(text)", "torch.load(path)", "torch.load(path, weights_only=False)", "yaml.load(file)",
        "subprocess.run(x, shell=True)", "os.system(x)", "np.load(p, allow_pickle=True)", "server.bind(('', 80))", "HOST = '0.0.0.0'",
        "sympy.parse_expr(x)", "from sympy import sympify", "from math_verify import ExprExtractionConfig",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "ray.init()",
        "class C:\n    trust_remote_code: bool = True", "def f(*, trust_remote_code=True): ...", "TCPStore(a, 0, is_master=True)",
    ],
)  # fmt: skip
def test_the_audit_sees_what_it_is_there_for(line):
    assert list(findings(ast.parse(line)))


HOSTILE = [
    "__import__('os').system('touch /tmp/x')", "exec(open('/etc/passwd').read())", "eval('1+1')", "().__class__.__bases__[0].__subclasses__()",
    "lambda: open('/tmp/x', 'w')", "Symbol('x').__class__", "\\text{__import__('os').getcwd()}", "{{7*7}}", "${7*7}", "$(touch /tmp/x)", "`id`",
    "x = [i for i in ().__class__.__mro__]", "\\write18{touch /tmp/x}", "\\input{/etc/passwd}", "E.free_symbols", "solve(x**2-1)", "10**8", "'a' * 3",
]  # fmt: skip


GRADE_UNDER_AUDIT = """
import json, sys
from openrl_reason.tasks.graders import GRADERS, load_grader
hostile = json.loads(sys.argv[1])
wrappers = ["{}", "so \\\\boxed{{{}}}", "$ {} $", "#### {}", "The answer is {}.", "Answer: ({})"]
kinds = [*GRADERS, "choice4"]
graders = {kind: load_grader(kind) for kind in dict.fromkeys(kinds)}
watched = ("exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.bind", "import")
seen, watching = set(), False
sys.addaudithook(lambda event, arguments: seen.add((event, str(arguments)[:200])) if watching and event in watched else None)
def grade_all(texts):
    for kind, grader in graders.items():
        for text in texts:
            for wrapper in wrappers:
                for answer, gold in ((wrapper.format(text), "5"), ("so \\\\boxed{5}", text)):
                    try:
                        grader(answer, gold)
                    except ValueError:
                        pass  # a gold that a grader does not take
grade_all(["5", "\\\\frac{1}{2}", "(1, 2]", "x^2 + 1", "a = b", "3 + 4 i", "\\\\{1, 2\\\\}"])  # whatever is imported late is there now
watching = True
grade_all(hostile)
watching = False
for kind in ("math", "math_parity"):
    assert float(getattr(graders[kind]("so \\boxed{5}", "5"), "score", 1)) == 1, "the wrappers do not reach the graders"
print(json.dumps([sorted(seen), sorted(graders)]))
"""


def test_graders_execute_nothing_of_what_they_read():
    """Python's own audit events: nothing is compiled, executed, started or connected to while code-like answers and golds are graded."""
    words = [sys.executable, "-c", GRADE_UNDER_AUDIT, json.dumps(HOSTILE)]
    result = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    seen, kinds = json.loads(result.stdout.splitlines()[-1])
    assert {"math", "gsm8k", "choice4"} <= set(kinds) and seen == []


def config_classes(monkeypatch) -> dict[str, type]:
    """The config class of every command."""
    found = {}

    def note(config_class, argv, *, prog):
        found[prog] = config_class
        raise InterruptedError

    monkeypatch.setattr(cli, "parse_config", note)
    monkeypatch.setattr("openrl_reason.observe.report.parse_config", note)
    for name, command in cli.COMMANDS.items():
        with pytest.raises(InterruptedError):
            command.run([], name)
    return found


def test_remote_code_is_off_in_the_settings_of_every_command(monkeypatch):
    switches = {}
    for name, config_class in config_classes(monkeypatch).items():
        for flag, value in flatten(to_dict(parse_config(config_class, [], prog=name))):
            if flag.endswith("trust_remote_code"):
                switches[f"{name} {flag}"] = value
    assert len(switches) >= 4 and not any(switches.values()), switches


def flatten(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_no_secret_of_the_environment_gets_into_settings_or_what_is_told_to_workers(monkeypatch, tmp_path):
    from openrl_reason.workers.model_group import _INHERITED_ENVIRONMENT

    canaries = {name: f"canary-{name}" for name in ("WANDB_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    for name, config_class in config_classes(monkeypatch).items():
        save_config(parse_config(config_class, [], prog=name), tmp_path / "config.yaml")
        assert "canary" not in (tmp_path / "config.yaml").read_text(), name
    told = {**runtime_variables("cpu"), **runtime_variables("gpu"), **dict.fromkeys(_INHERITED_ENVIRONMENT, "")}
    assert not any(re.search(r"key|token(?!izers)|secret|password", name, re.IGNORECASE) for name in told), told
    assert not any("canary" in value for value in told.values())


def test_a_private_cluster_listens_on_loopback_only_and_shows_no_secret(tmp_path):
    """Ray, two model ranks over gloo, an engine, and weights by broadcast."""
    from openrl_reason.models.tiny import make_model

    model = tmp_path / "model"
    make_model(model, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=128, max_position=256)
    ray_folder = Path("/tmp") / f"ray-{os.getpid()}-private"  # short: the paths of its sockets may have 107 characters
    secret, token = "canary-5f0c1e", "6b" * 32
    environment = os.environ | {"RAY_TMPDIR": str(ray_folder), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WANDB_API_KEY": secret}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    ray_folder.mkdir()
    try:
        words = [sys.executable, "-m", "tests.workers.private_cluster", str(model)]
        result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        found = json.loads(result.stdout.splitlines()[-1])
        assert found["node"] == "127.0.0.1" and found["completions"] == 1
        assert {"ray::_ModelActor", "ray::EngineActor"} <= {name.partition(".")[0] for name in found["processes"]}, found["processes"]
        assert found["beyond_loopback"] == []
        assert not re.search(r"dashboard/dashboard\.py|log_monitor\.py|monitor\.py", found["command_lines"]), "half of Ray's start, for nothing"
        assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in found["variables"], "a cluster that is joined later would be taken for a private one"
        sessions = ray_folder / f"ray-{os.getuid()}"
        assert stat.S_IMODE(sessions.stat().st_mode) == 0o700 and [path.name for path in ray_folder.iterdir()] == [sessions.name]
        files = {path: path.read_bytes() for path in ray_folder.rglob("*") if path.is_file()}
        for canary in (secret, token):
            assert canary not in found["command_lines"] + result.stdout + result.stderr
            assert not [path for path, content in files.items() if canary.encode() in content]
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", str(ray_folder)], check=True)


def test_the_token_of_private_clusters_can_be_read_by_its_owner_only_and_is_never_replaced(tmp_path, monkeypatch):
    from openrl_reason.workers.network import write_token_file

    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".ray/auth_token"
    write_token_file()
    first = path.read_text()
    assert len(first) == 64 and stat.S_IMODE(path.stat().st_mode) == 0o600
    write_token_file()
    assert path.read_text() == first and [entry.name for entry in path.parent.iterdir()] == ["auth_token"]
    path.unlink()
    for name, value in (("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_TOKEN_PATH", "/x"), ("RAY_AUTH_MODE", "disabled")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            write_token_file()
        assert not path.exists()


def test_sessions_of_private_clusters_are_never_kept_in_a_folder_that_others_can_enter(tmp_path, monkeypatch):
    from openrl_reason.workers.network import private_folder

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folder = Path(private_folder()).parent
    assert folder.parent == tmp_path and stat.S_IMODE(folder.stat().st_mode) == 0o700 and private_folder() == str(folder / "ray")
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="not yours alone"):
        private_folder()
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not yours alone"):
        private_folder()


def test_fields_of_settings_that_are_named_like_secrets_are_redacted_when_shown(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Tracker:
        wandb_api_key: str = "s3cret"
        auth_token: str = "s3cret"

    save_config(Tracker(), tmp_path / "config.yaml")
    assert "s3cret" not in (tmp_path / "config.yaml").read_text()
