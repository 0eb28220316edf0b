"""README, docs and scripts say nothing that does not exist: commands parse, Python compiles, settings are accepted, links lead somewhere."""

import ast
import importlib
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from openrl_reason import cli
from openrl_reason.config import flag_names, parse_config
from openrl_reason.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ROOT / "examples/scripts"
JOB_SCRIPTS = {
    "train_sft_gsm8k.sh": [], "train_reinforce_gsm8k.sh": [], "train_reinforce_math.sh": [], "evaluate_math.sh": ["/models/some"],
    "train_ppo_gsm8k.sh": [], "train_vineppo_gsm8k.sh": [], "train_vineppo_math.sh": [], "ray_job_cpu.sh": ["OUT"],
}  # fmt: skip
OTHER_COMMANDS = {".", "cat", "cd", "chmod", "curl", "docker", "export", "git", "kill", "ls", "pip", "scp", "ssh", "tail", "tensorboard"}
"""Commands that pages may show without their being parsed here; the parsed ones are openrl-reason, bash and python with files that exist, and ray."""
OTHER_FLAGS = {
    "--gpus", "--shm-size", "--no-deps", "--help", "--version", "--config", "--print_config", "--head", "--address", "--num-gpus", "--port",
    "--node-ip-address", "--dashboard-host", "--runtime-env-json", "--working-dir", "--block", "--num-cpus", "--no-wait", "--temp-dir",
    "--object-store-memory", "--generate", "--reward.remote_url",
}  # fmt: skip
"""Flags of other programs that running text mentions."""


class Parsed(Exception):
    """Raised in place of running a command whose words were accepted."""


@pytest.fixture
def parse(monkeypatch):
    """A function that lets a command read its words and then stops it. Files that a page only names need not exist."""
    report = importlib.import_module("openrl_reason.observe.report")

    def stop(config_class, argv, *, prog):
        words, kept = iter(argv), []
        for word in words:
            if word == "--config":
                next(words)
            else:
                kept.append(word)
        parse_config(config_class, kept, prog=prog)
        raise Parsed

    def run(words):
        if words[1:] in (["--help"], ["--version"]) or words[2:] in (["--help"], ["--print_config"]):
            return
        name = words[1]
        assert name in cli.COMMANDS, f"there is no command {name!r}"
        with monkeypatch.context() as patch:
            patch.setattr(cli, "parse_config", stop)
            patch.setattr(report, "parse_config", stop)
            try:
                cli.COMMANDS[name].run(words[2:], f"openrl-reason {name}")
            except Parsed:
                return
            except ConfigError as error:
                if "no such file" in str(error):
                    return
                raise AssertionError(f"{' '.join(words)}\n{error}") from None
        raise AssertionError(f"{words[1]} did not read its settings")

    return run


def blocks(path: Path):
    """(language, text) of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The simple commands of a shell text, as words; variables become "7", redirections and assignments in front are dropped."""
    text = re.sub(r"\\\n", " ", text)
    text = re.sub(r'"\$\{?@[^"]*"', "", text)  # flags that are passed on
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    text = re.sub(r"\$\{?\w+\}?", "7", text)
    found: list[list[str]] = []
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>()")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;()"):
                found.append(words)
                words = []
            else:
                words.append(word)
    cut = [next((words[:position] for position, word in enumerate(words) if set(word) <= set("<>")), words) for words in found]
    bare = [words[next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words)) :] for words in cut]
    return [words for words in bare if words]


def check_command(words: list[str], parse) -> None:
    """One command of a page."""
    if words[:3] == ["python", "-m", "openrl_reason"]:
        words = ["openrl-reason", *words[3:]]
    if words[0] == "openrl-reason":
        parse(words)
    elif words[0] in ("bash", "python") and words[1].endswith((".sh", ".py")):
        assert (ROOT / words[1]).exists(), f"{words[1]} does not exist"
    elif words[0] == "ray":
        check_ray(words, parse)
    else:
        assert words[0] in OTHER_COMMANDS, f"{' '.join(words)!r}: not known to this test"


def check_ray(words: list[str], parse) -> None:
    """Ray's own parser accepts the flags; what a job runs is checked as well."""
    with warnings.catch_warnings(action="ignore"):
        from ray.scripts.scripts import cli as ray_cli

    command, rest = ray_cli, words[1:]
    if "--" in rest:
        check_command(rest[rest.index("--") + 1 :], parse)
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"there is no {' '.join(words)!r}"
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(command.name, list(rest))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_block_of_a_page_is_accepted_by_what_it_is_for(path, parse):
    for language, text in blocks(path):
        if language == "bash":
            for words in commands(text):
                check_command(words, parse)
        elif language == "python":
            check_python(text)
        elif language == "yaml":
            assert_some_command_takes(yaml.safe_load(text))
        elif language in ("json", "jsonl"):
            for line in text.splitlines() if language == "jsonl" else [text]:
                json.loads(line)
        else:
            assert language in ("", "text", "html"), f"a block of {language!r} is not checked: give it a language that is"
            for line in re.findall(r"^(?:\$ )?(openrl-reason .*)$", text.replace("\\\n", " "), re.MULTILINE):
                for words in commands(line):
                    check_command(words, parse)


def check_python(text: str) -> None:
    """It compiles, and what it imports from the package exists."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("openrl_reason"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def config_classes() -> list[type]:
    from openrl_reason.algorithms.collection import CollectConfig
    from openrl_reason.algorithms.dpo import DPOConfig
    from openrl_reason.algorithms.iterate import IterateConfig
    from openrl_reason.algorithms.kto import KTOConfig
    from openrl_reason.algorithms.oreo import OREOConfig
    from openrl_reason.algorithms.ppo import PPOConfig
    from openrl_reason.algorithms.reinforce import ReinforceConfig
    from openrl_reason.algorithms.restem import RestEMConfig
    from openrl_reason.algorithms.sft import SFTConfig
    from openrl_reason.algorithms.vineppo import VinePPOConfig
    from openrl_reason.data.inspect_data import InspectDataConfig
    from openrl_reason.evaluation.analyze_policy import AnalyzePolicyConfig
    from openrl_reason.evaluation.analyze_values import AnalyzeValuesConfig
    from openrl_reason.evaluation.compare import CompareConfig
    from openrl_reason.evaluation.evaluate import EvaluateConfig
    from openrl_reason.models.export_checkpoint import ExportConfig
    from openrl_reason.models.make import MakeModelConfig
    from openrl_reason.observe.report import ReportConfig
    from openrl_reason.search.config import SearchConfig

    training = [ReinforceConfig, PPOConfig, VinePPOConfig, SFTConfig, RestEMConfig, DPOConfig, KTOConfig, OREOConfig, CollectConfig, IterateConfig]
    studies = [EvaluateConfig, SearchConfig, AnalyzeValuesConfig, AnalyzePolicyConfig, CompareConfig]
    return [*training, *studies, InspectDataConfig, ExportConfig, MakeModelConfig, ReportConfig]


def assert_some_command_takes(settings: dict) -> None:
    words = [word for name, value in settings.items() for word in (f"--{name}", json.dumps(value) if isinstance(value, dict | list) else str(value))]
    errors = []
    for config_class in config_classes():
        try:
            parse_config(config_class, words, prog="docs")
            return
        except ConfigError as error:
            if "no such file" in str(error):  # a page may name files that it does not bring
                return
            errors.append(f"{config_class.__name__}: {error}")
    raise AssertionError("\n".join(errors))


def test_every_flag_that_running_text_mentions_exists():
    """In inline code, outside the columns that give other libraries' names."""
    known = {f"--{flag}" for config_class in config_classes() for flag in flag_names(config_class)} | OTHER_FLAGS
    groups = {flag.rpartition(".")[0] for flag in known if "." in flag}
    for path in PAGES:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        for line in text.splitlines():
            if path.name == "coming_from.md" and line.startswith("|"):
                line = line.rstrip(" |").rpartition("|")[2]
            for code in re.findall(r"`([^`]+)`", line):
                for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*", code):
                    flag = flag.rstrip(".")
                    assert flag in known or flag in groups, f"{path.name}: {flag} does not exist"


def test_links_between_pages_lead_somewhere_and_the_index_names_every_page():
    for path in PAGES:
        text = path.read_text()
        headings = {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            file, _, anchor = target.partition("#")
            other = path.parent / file if file else path
            assert other.exists(), f"{path.name}: {target}"
            if anchor and other.suffix == ".md":
                there = headings if not file else {slug(heading) for heading in re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)}
                assert anchor in there, f"{path.name}: {target}"
    index = (ROOT / "docs/README.md").read_text()
    assert not [path.name for path in PAGES if path.parent.name == "docs" and path.name != "README.md" and f"({path.name})" not in index]


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_commands_page_has_every_command(parse):
    shown = {words[1] for language, text in blocks(ROOT / "docs/commands.md") if language == "bash" for words in commands(text)}
    assert shown >= set(cli.COMMANDS)


@pytest.fixture
def recorded(tmp_path):
    """Runs a script with `ray` and `python -m openrl_reason` replaced by programs that note their words; returns these."""
    programs = tmp_path / "bin"
    programs.mkdir()
    note = f'#!/usr/bin/env bash\nprintf "%s\\0" "$(basename "$0")" "$@" >>"{tmp_path}/calls"\nprintf "\\n\\0" >>"{tmp_path}/calls"\n'
    (programs / "ray").write_text(note)
    real = shlex.quote(sys.executable)
    (programs / "python").write_text(note.replace("\nprintf", f'\nif [ "$1" != -m ]; then exec {real} "$@"; fi\nprintf', 1))
    for program in programs.iterdir():
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def run(script, *words, **variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = f"{programs}:{os.environ['PATH']}"
        environment |= {"PATH": path, "HOME": str(tmp_path), "RAY_DASHBOARD_PORT": "1", "WANDB_API_KEY": "canary"} | variables
        result = subprocess.run(["bash", str(SCRIPTS / script), *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        calls, call = [], []
        for word in (tmp_path / "calls").read_text().split("\0")[:-1]:
            if word == "\n":
                calls.append(call)
                call = []
            else:
                call.append(word)
        return calls, result.stdout + result.stderr

    return run


@pytest.mark.parametrize("script", JOB_SCRIPTS)
@pytest.mark.parametrize(
    "variables", [{}, {"NUM_GPUS": "4", "NUM_NODES": "2", "DATA": ".", "GSM8K": "x.jsonl", "MATH500": "y.jsonl", "ADVANTAGE": "grpo"}]
)
def test_a_job_script_starts_a_cluster_with_a_token_and_submits_commands_that_exist(script, variables, recorded, parse, tmp_path):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in JOB_SCRIPTS[script]]
    calls, output = recorded(script, *words, **variables)
    start, *submitted = [call for call in calls if call[0] == "ray"]
    assert start[:2] == ["ray", "start"] and start[start.index("--dashboard-host") + 1] == "127.0.0.1"
    check_ray(start, parse)
    token = (tmp_path / ".ray/auth_token").read_text()
    assert submitted and token not in output and not any(token in word for call in calls for word in call)
    for call in submitted:
        check_ray(call, parse)
        environment = json.loads(next(word for word in call if word.startswith("--runtime-env-json=")).partition("=")[2])
        assert environment["working_dir"] == str(ROOT) and {"/.git/", "/.venv*/", "/runs/"} <= set(environment["excludes"])
        assert set(environment) == {"working_dir", "excludes"}, "a runtime environment is shown in the dashboard: nothing secret may be in it"
        assert "canary" not in " ".join(call)
        job = call[call.index("--") + 1 :]
        places = [job[index + 1] for index, word in enumerate(job) if word in ("--run.output_dir", "--output")]
        assert places and all(Path(place).is_absolute() for place in places), "a job runs in a copy of the working directory, which is deleted"
        if script != "ray_job_cpu.sh":
            gpus = int(variables.get("NUM_GPUS", 8)) * int(variables.get("NUM_NODES", 1))
            assert str(gpus) in (job[job.index(flag) + 1] for flag in ("--policy.num_ranks", "--rollout.num_engines") if flag in job)


@pytest.mark.parametrize(
    ("command", "files"),
    [
        ("ppo", ["vineppo_base", "ppo_gsm8k"]), ("vineppo", ["vineppo_base", "vineppo_gsm8k"]), ("vineppo", ["vineppo_base", "vineppo_math"]),
        ("ppo", ["arithmetic_cpu"]), ("vineppo", ["arithmetic_cpu"]), ("iterate", ["iterate_arithmetic_cpu"]),
    ],
)  # fmt: skip
def test_the_settings_files_of_the_examples_are_read_by_their_commands(command, files):
    from openrl_reason.algorithms.iterate import IterateConfig
    from openrl_reason.algorithms.ppo import PPOConfig
    from openrl_reason.algorithms.vineppo import VinePPOConfig

    paths = [ROOT / "examples/configs" / f"{name}.yaml" for name in files]
    words = [word for path in paths for word in ("--config", str(path))]
    config = parse_config({"ppo": PPOConfig, "vineppo": VinePPOConfig, "iterate": IterateConfig}[command], words, prog=command)
    if len(files) > 1:  # what both published methods share, after both files
        assert (config.prompts_per_step, config.samples_per_prompt, config.algo.epochs, config.algo.minibatches) == (64, 8, 2, 8)
        assert config.algo.kl.coef == 1e-4 and config.policy.lr == 1e-6 and config.reward.truncated == 0
        assert config.task.name in files[1] and config.task.prompt_style == "vineppo" and config.run.steps in (650, 1000)
    assert {path.name for path in (ROOT / "examples/configs").glob("*.yaml")} >= {path.name for path in paths}


def test_start_ray_leaves_a_cluster_that_answers_alone(recorded, tmp_path):
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        (tmp_path / "calls").touch()
        calls, output = recorded("start_ray.sh", RAY_DASHBOARD_PORT=str(listener.getsockname()[1]))
    assert calls == [] and "using it" in output


def test_commands_of_the_other_scripts_have_flags_that_exist(parse):
    found = 0
    for path in sorted(SCRIPTS.glob("*.sh")):
        text = path.read_text().replace("\\\n", " ")
        for name, body in re.findall(r"^(\w+)=\(\n(.*?)\n\)", text, re.DOTALL | re.MULTILINE):
            text = text.replace(f'"${{{name}[@]}}"', body.replace("\n", " "))
        for line in re.findall(r"^ *(openrl-reason [\w-]+ +--[^\n|`]*)$", text, re.MULTILINE):
            for words in commands(line):
                parse(words)
                found += 1
    assert found >= 4, "the commands were not found: has their form changed?"
