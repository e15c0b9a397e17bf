"""Every block of code in README.md and docs/ runs, and every command in them exists."""

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig

import base_config
import deploy
from base_config import load_config
from rollouts.remote.command_line import with_verb
from rollouts.training.advantages import compute_advantages
from rollouts.training.rl_losses import policy_loss
from tests.docs_blocks import (
    GUIDE,
    PAGES,
    ROOT,
    Block,
    blocks_of,
    is_run,
    shell_commands,
    spoken_commands,
)
from tests.engines.serving import serving
from tests.training.datasets.families import family_tokenizer
from tests.training.process_nursery import shared

# output: what the block before printed; text: a drawing
LANGUAGES = "python", "sh", "json", "jsonl", "output", "text"
# Blocks with the marker <!-- not run: why -->: there is none, and a new one has to stand here too.
NOT_RUN: dict[tuple[str, str], str] = {}  # (page, first line) -> why
OTHER_PROGRAMS = (
    "python3",
    "cmp",
    "git",
    "cd",
    "cat",
    "echo",
    "ls",
    "tail",
    "head",
    "jq",
    "curl",
    "mkdir",
    "grep",
)
# What must be true after a page's python blocks, where the page itself does not print it.
CHECKS = {
    "README.md": "len(metrics) == 20 and metrics[-1]['loss'] < metrics[0]['loss']",
    "docs/reference/agents.md": "len(batch.samples) == 16 and agent.turns_max == 4 and len(tasks.prompts()) == 9",
    "docs/reference/config.md": "config.problems() == ()",
    "docs/reference/data-formats.md": "len(samples) == 50",
    "docs/reference/rewards.md": "preferred.base_url.endswith(':30500')",
    "docs/reference/sharding.md": "backend is not None",
    "docs/design/restarts.md": "pool.clients[1].base_url == urls[1] and pool.reruns.times_max == 3",
}
BLOCKS = [
    block for page in PAGES for block in blocks_of(page, (ROOT / page).read_text(encoding="utf-8"))
]
PYTHON_PAGES = sorted(
    {block.page for block in BLOCKS if block.language == "python" or is_run(block)} - {*GUIDE}
)


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_every_block_says_what_it_is() -> None:
    """Goal: no block is passed over since nobody knows its language, or is marked as not run without standing here.
    Red with a block without a language."""
    unknown = [
        f"{block.page}:{block.line}: {block.language!r}"
        for block in BLOCKS
        if block.language not in LANGUAGES
    ]
    assert unknown == []
    marked = {
        (block.page, block.text.split("\n")[0]): block.not_run for block in BLOCKS if block.not_run
    }
    assert marked == NOT_RUN
    assert [page for page in CHECKS if page not in PYTHON_PAGES] == []


def test_fences_are_read_as_commonmark_reads_them() -> None:
    """Goal: a longer fence holds a shorter one, tildes hold backticks, and one that nobody closes ends with the page.
    Red with every line that begins with three backticks taken for a fence."""
    text = (
        "````md\n```python\n1\n```\n````\n<!-- not run: why -->\n\n~~~sh x\n```\n~~~\n  ```json\n{}"
    )
    found = [
        (block.line, block.language, block.text, block.not_run) for block in blocks_of("p", text)
    ]
    assert found == [
        (2, "md", "```python\n1\n```", None),
        (9, "sh", "```", "why"),
        (12, "json", "{}", None),
    ]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the pages name: a directory goes before a hub id of its name."""
    work = tmp_path_factory.mktemp("docs")
    model = work / "Qwen" / "Qwen2.5-0.5B"
    tokenizer = family_tokenizer("qwen2_5")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(
        **sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    data = work / "openai" / "gsm8k"
    data.mkdir(parents=True)
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train.jsonl\n---\n"
    (data / "README.md").write_text(card)
    (data / "main").mkdir()
    rows = [{"question": f"{n} + 1?", "answer": f"It is {n + 1}. #### {n + 1}"} for n in range(64)]
    (data / "main" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "configs").symlink_to(ROOT / "configs")
    return work


@pytest.fixture(scope="module")
def engine_url(stand_ins: Path) -> Iterator[str]:
    with serving(stand_ins / "Qwen" / "Qwen2.5-0.5B", max_running_requests="64") as url:
        yield url


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_blocks_run(page: str, stand_ins: Path, engine_url: str, tmp_path: Path) -> None:
    """Goal: what a page shows runs as it stands, block after block, with nothing but what the page imported; a tiny
    model has the place of the named one. Red with docs/reference/agents.md as it was: NameError."""
    work = tmp_path / "work"
    shutil.copytree(stand_ins, work, symlinks=True)
    log = tmp_path / "log"
    arguments = [str(work), page, engine_url, CHECKS.get(page, "True")]
    code = shared().wait(shared().start("tests.docs_blocks", arguments, log))
    assert code == 0, log.read_text()[-4000:]


def test_json_blocks_parse() -> None:
    """Goal: no comma too many in what people copy. Red with a trailing one in a block of JSON."""
    for block in BLOCKS:
        if block.language in ("json", "jsonl"):
            for text in block.text.splitlines() if block.language == "jsonl" else [block.text]:
                json.loads(text)


def test_links_lead_somewhere() -> None:
    """Goal: no page points at a file or a heading that is gone. Red with a heading renamed."""
    anchors = {page: set(_anchors((ROOT / page).read_text(encoding="utf-8"))) for page in PAGES}
    lost = []
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)", prose):
            file = (ROOT / page).parent / target if target else ROOT / page
            known = anchors.get(str(file.resolve().relative_to(ROOT)), set())
            if not file.exists() or (anchor and anchor not in known):
                lost.append(f"{page}: {target}#{anchor}")
    assert lost == []


def _anchors(text: str) -> Iterator[str]:
    for heading in re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    ):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_no_page_has_two_versions_of_a_line() -> None:
    """Goal: a merge is finished before it lands. Red with the marks of one left in docs/architecture.md."""
    marks = re.compile(r"^(<{7} |={7}$|>{7} )", re.MULTILINE)
    assert [page for page in PAGES if marks.search((ROOT / page).read_text(encoding="utf-8"))] == []


def test_files_that_pages_name_exist() -> None:
    """Goal: a page never sends one to a file that was moved. Red with a module renamed."""
    spans = [
        (page, span)
        for page in PAGES
        for span in re.findall(r"`([^`\n]+)`", (ROOT / page).read_text())
    ]
    named = [
        (page, span)
        for page, span in spans
        if re.fullmatch(r"(rollouts|scripts|tests|configs)/[\w./-]+", span)
    ]
    assert named and [(page, span) for page, span in named if not (ROOT / span).exists()] == []


# --- commands ---------------------------------------------------------------------------------------------------------


def problems_of(words: list[str]) -> list[str]:
    """What is wrong with a command: a verb, an option, a script, a module or a config that does not exist."""
    program, *rest = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program = program.removeprefix(".venv/bin/")
    if program == "deploy":
        return _deploy_problems(rest)
    if program.startswith("scripts/"):
        return _script_problems(program, rest)
    if program == "python" and rest[:1] == ["-m"]:
        return _script_problems(_module_file(rest[1]), rest[2:]) if _is_ours(rest[1]) else []
    if program == "python":
        return _script_problems(rest[0], rest[1:])
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        asked = re.findall(r"[\w-]+", " ".join(re.findall(r"\[(.*?)\]", " ".join(rest))))
        return [f"no extra {name!r}" for name in asked if name not in extras]
    return [] if program in OTHER_PROGRAMS else [f"{program}: what is this?"]


def _is_ours(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] in ("rollouts", "benchmarks", "tests")


def _module_file(module: str) -> str:
    name = module.replace(".", "/")
    return f"{name}/__main__.py" if (ROOT / name).is_dir() else f"{name}.py"


def _deploy_problems(words: list[str]) -> list[str]:
    group: Any = typer.main.get_command(deploy.app)
    # any config will do
    named = ["configs/00_cpu_sft_rl.py" if word == "CONFIG" else word for word in words]
    try:
        verb, *rest = with_verb(named, group.commands)
    except ValueError as error:
        return [f"deploy {' '.join(words)}: {error}"]
    if verb.startswith("-"):
        return []
    if verb not in group.commands:
        return [f"deploy has no verb {verb!r}"]
    try:
        context = group.commands[verb].make_context(verb, rest)
    except Exception as error:
        # typer brings a click of its own: its errors are known by what they can say
        if not hasattr(error, "format_message"):
            raise
        return [f"deploy {' '.join(words)}: {error.format_message()}"]
    config = context.params.get("config")
    if config is None or not str(config).startswith("configs/"):
        return []
    return (
        list(load_config(ROOT / config).problems())
        if (ROOT / config).is_file()
        else [f"no file {config}"]
    )


def _script_problems(script: str, words: list[str]) -> list[str]:
    path = ROOT / script
    if not path.is_file():
        return [f"no file {script}"]
    source = path.read_text()
    if script.startswith("scripts/") and not script.endswith(".py"):
        called = re.findall(r"scripts/\w+\.py", source)
        source += "".join((ROOT / name).read_text() for name in called)
        if "bin/deploy" in source:
            return _deploy_problems(["configs/00_cpu_sft_rl.py", *words])
    if "pytest" in source:
        return []
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    return [f"{script} has no option {name}" for name in options if f'"{name}"' not in source]


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "sh"], ids=lambda b: f"{b.page}:{b.line}"
)
def test_shell_blocks_name_what_exists(block: Block) -> None:
    """Goal: verbs, options, scripts, extras and configs of every command exist. Red with `deploy launch`."""
    assert [problem for words in shell_commands(block.text) for problem in problems_of(words)] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_name_what_exists(page: str) -> None:
    """Goal: likewise for commands in backticks. Red with an option that benchmarks.grpo does not have."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [problem for words in spoken_commands(text) for problem in problems_of(words)]
    # `deploy attach`, in passing
    assert [problem for problem in found if "Missing argument" not in problem] == []


@pytest.mark.parametrize(
    "command",
    [
        "deploy launch RUN",
        "deploy logs",
        "deploy configs/00_cpu_sft_rl.py --dry-run",
        "deploy configs/none.py",
        "scripts/none",
        "scripts/run_eval.py MODEL --dataset FILE",
        "python -m benchmarks.grpo --token 8",
        "pip install '.[trains]'",
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    """Goal: the check above can fail: verbs, arguments, options, files, extras."""
    (words,) = shell_commands(command)
    assert problems_of(words)


def test_trees_of_names() -> None:
    """Goal: blocks that are no code name what there is: files of a run, and modules. Red with a module renamed."""
    texts = [block for block in BLOCKS if block.language == "text"]
    documented = (ROOT / "docs" / "reference" / "run-directory.md").read_text()
    (tree,) = (
        block.text
        for block in texts
        if block.page == "README.md" and block.text.startswith("config.json")
    )
    names = [line.split("  ")[0] for line in tree.splitlines()]
    missing = [
        name
        for line in names
        for name in re.findall(r"[\w.]+(?=[ /]|$)", line)
        if name not in documented
    ]
    assert missing in ([], ["sft", "rl"])
    for name in re.findall(
        r"rollouts(?:\.(?!jsonl)\w+)+", "\n".join(block.text for block in texts)
    ):
        path = ROOT / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


# --- tables -----------------------------------------------------------------------------------------------------------


def test_published_methods_can_be_set_as_their_table_says() -> None:
    """Goal: each row of docs/reference/losses.md gives a loss with a gradient, with no option but those that it
    names. Red with the table as it was: Dr. GRPO's needs `length_norm`."""
    table = (
        (ROOT / "docs" / "reference" / "losses.md")
        .read_text()
        .split("## How to set the published methods")[1]
        .split("##")[0]
    )
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if "|" in line
    ][2:]
    assert len(rows) >= 8
    torch.manual_seed(0)
    labels, mask = torch.randint(0, 7, (4, 6)), torch.ones(4, 6)
    for method, baseline, norm, loss, clips, aggregation, more in rows:
        logits = torch.randn(4, 6, 7, requires_grad=True)
        options = {
            "loss": getattr(base_config, loss).kind,
            "aggregation": aggregation,
            "old_log_probs": torch.full((4, 6), -2.0),
        }
        if clips:
            low, high = re.findall(r"[\d.e-]+", clips)[:2]
            options["clip_range"] = (float(low), float(high))
        if "length_norm" in more:
            options["length_norm"] = 5.0
        if "KLConfig" in more:
            coef = float(re.findall(r"coef ([\d.]+)", more)[0])
            options |= {"kl_coef": coef, "ref_log_probs": torch.zeros(4, 6)}
        if baseline == "ValueModel":
            advantages = torch.randn(4, 6)
        else:
            given = float(baseline) if baseline == "0.0" else baseline
            advantages = torch.tensor(
                compute_advantages([1.0, 0.0, 0.5, 0.0], given, norm=norm, group_ids=[0] * 4)
            )
        policy_loss(logits, labels, mask, advantages, **options).backward()
        assert logits.grad is not None and logits.grad.abs().sum() > 0, method


def test_the_trust_model_names_tests_that_exist() -> None:
    """Goal: every test that docs/security.md gives for a sentence is there. Red with one of them renamed."""
    spans = re.findall(r"`([^`]*test_[^`]*)`", (ROOT / "docs/security.md").read_text())
    there = {
        *(path.name for path in ROOT.glob("tests/**/test_*.py")),
        *(
            name
            for path in ROOT.glob("tests/**/test_*.py")
            for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
        ),
    }
    named = [name for span in spans for name in re.findall(r"test_\w+(?:\.py)?", span)]
    assert len(named) > 40 and [name for name in named if name not in there] == []
