"""Requirements held against installed versions, beside the reference implementation, `packaging`."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from rollouts.worker.environments.requirement import applies, parse, problems, satisfies

NUMBERS = st.lists(st.integers(0, 3).map(str), min_size=1, max_size=3).map(".".join)
RELEASES = st.tuples(st.sampled_from(["", "", "1!"]), NUMBERS).map("".join)
VERSIONS = st.tuples(
    RELEASES,
    st.sampled_from(["", "", "a1", "rc2", ".beta.3"]),
    st.sampled_from(["", "", ".post1", "-2"]),
    st.sampled_from(["", "", ".dev0", ".dev12"]),
    st.sampled_from(["", "", "+cpu", "+cu126.1"]),
).map("".join)
OPERATORS = st.sampled_from(["==", "!=", "<", "<=", ">", ">=", "~="])


@settings(max_examples=2000)
@given(VERSIONS, OPERATORS, VERSIONS | RELEASES.map("{}.*".format))
def test_specifiers(version: str, operator: str, limit: str) -> None:
    """Goal: the answer is packaging's, local parts (2.13.0+cpu) and pre-releases included. Red with the local part
    compared too: a CPU wheel would not satisfy torch==2.13.0."""
    try:
        expected = SpecifierSet(f"{operator}{limit}").contains(version, prereleases=True)
    except InvalidSpecifier:  # ~=2, >=2.*, <2+cpu
        return
    assert satisfies(version, ((operator, limit),)) == expected


@pytest.mark.parametrize(
    "line",
    [
        "torch",
        "Torch_Memory.saver==0.0.9.post1",
        "math-verify[antlr4]>=0.8",
        "verifiers >= 0.4, < 0.5",
        "numpy (>=1.2,<3) ; python_version < '3.10'",
        "foo @ https://example.org/foo-1.0.whl",
        "tomli>=1.1; python_version < '3.11' and extra == 'toml'",
    ],
)
def test_lines(line: str) -> None:
    """Goal: name, specifiers and marker are those that packaging reads. Red with extras left in the name."""
    expected, found = Requirement(line), parse(line)
    assert found is not None
    assert set(found.specifiers) == {(each.operator, each.version) for each in expected.specifier}
    assert found.name == expected.name.lower().replace("_", "-").replace(".", "-")
    assert str(Marker(found.marker) if found.marker else None) == str(expected.marker)


@pytest.mark.parametrize(
    "line",
    [
        "--no-index",
        "--find-links /w",
        "-e .",
        "./pkg",
        "/a/b.whl",
        "a.whl",
        "git+https://h/x",
        "  --hash=sha256:0",
        "",
    ],
)
def test_lines_that_name_no_package(line: str) -> None:
    """Goal: nothing is asked of them. Red with an option's value taken for a package."""
    assert parse(line) is None


@pytest.mark.parametrize(
    "marker",
    [
        "python_version < '3.10'",
        "python_version >= '3.9' and sys_platform == 'linux'",
        "(python_version < '3' or sys_platform == 'linux') and platform_machine != 'arm64'",
        "'linux' in sys_platform",
        "platform_machine not in 'arm64 aarch64'",
        "python_version == '3.*'",
        "extra == 'x'",
        "implementation_name == 'cpython' or os_name == 'nt'",
        "python_full_version < '3.11.0a1'",
    ],
)
def test_markers(marker: str) -> None:
    """Goal: a marker holds here when packaging says so. Red with versions compared as texts: '3.9' after '3.11'."""
    values = {name: str(value) for name, value in default_environment().items()}
    assert applies(marker, values) == Marker(marker).evaluate({"extra": ""})


def test_problems() -> None:
    """Goal: what lacks, and what is at another version, by name; a constraint binds only what is there; hashes,
    comments and false markers ask nothing. Red with constraints taken for requirements."""
    installed = {"torch": "2.13.0+cpu", "numpy": "1.0"}
    requirements = [
        "torch==2.13.0 --hash=sha256:00 \\",
        "    --hash=sha256:11",
        "gone>=1 # why",
        "x; python_version<'3'",
    ]
    constraints = ["numpy>=2", "absent==1.0", "", "# text"]
    assert problems(requirements, constraints, installed, {"python_version": "3.11"}) == [
        "gone is not installed",
        "numpy is 1.0, needs >=2",
    ]
