"""Profiles and statics that nobody wrote on purpose: valid or refused, and what finding the others led to."""

import json
import subprocess
import sys

import pytest

from vllm_kvtuner.profile import problems
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.problems import ProfileError

CASES = 1000


@pytest.mark.slow
def test_mutated_files_are_valid_or_refused():
    command = [sys.executable, "-m", "tests.fuzz", "--cases", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["cases"] == CASES and report["failures"] == 0
    # The mutations are neither all fatal nor all harmless.
    assert min(report[f"{kind} {end}"] for kind in ("profile", "statics") for end in ("valid", "refused")) >= 5


@pytest.fixture
def problems_of(tmp_path):
    def read(content):
        path = tmp_path / "profile.yaml"
        path.write_bytes(content.encode())
        with pytest.raises(ProfileError) as caught:
            load_profile(str(path))
        assert all(each.startswith(f"{path}: ") for each in caught.value.problems)
        return [each.removeprefix(f"{path}: ") for each in caught.value.problems]

    return read


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("version: 1\nlayers: " + "1:" * 9000 + "1\n", "of base 60", id="a long number of base 60"),
        pytest.param("version: 1\nlayers: " + "1:" * 300 + "1.5\n", "of base 60", id="one that no float holds"),
        pytest.param(f"version: {'9' * 5000}\n", "of base 60 or many digits in line 1", id="many digits"),
        pytest.param("version: 1\nlayers: {0: K8V8, <<: {0: K4V4}}\n", "the merge key << in line 2", id="merge"),
        pytest.param("version: 1\nlayers: K4V4\n#" + " " * problems.MAX_BYTES, "at most 262,144 bytes", id="size"),
        pytest.param("".join(f"{n}: 1\n" for n in range(5000)), "more than 4096 keys in the mapping", id="keys"),
        pytest.param(
            f"version: 1\nlayers:\n  ? {'0-1023,' * 30_000}1\n  : K4V4\n", "0-1023 again", id="repeated layers"
        ),
        pytest.param(f"version: 1\nlayers: K4V4\nstatics: {'a' * 300}\n", "statics must name a file", id="long name"),
        pytest.param('version: 1\nlayers: K4V4\nstatics: "\\0"\n', "statics must name a file", id="no name"),
        pytest.param("[" * 200_000, "recursion", id="depth"),
    ],
)
@pytest.mark.timeout(60)
def test_what_could_crash_or_hang_is_refused(problems_of, content, message):
    (problem,) = problems_of(content)
    assert message in problem


def test_a_problem_is_one_line_that_a_terminal_may_show(problems_of):
    name = '"\\e[31m\\n' + "x" * 500 + '"'
    problems = problems_of(f"version: 1\nlayers: {{{name}: K4V4, 0: {name}}}\n")
    assert len(problems) == 2
    assert all(problem.isprintable() and len(problem) < 2000 for problem in problems)
    assert any("\\x1b[31m\\n" in problem for problem in problems)


@pytest.mark.parametrize("spec", ["a" * 300, "a/" * 3000, "\0"])
def test_a_name_that_no_file_can_have(spec):
    with pytest.raises(ProfileError, match="must be a file, a pair such as K8V4, or the name of a shipped profile"):
        load_profile(spec)
