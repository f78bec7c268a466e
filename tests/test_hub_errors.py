"""Everything that the Hub and the network can do to a push.

One sentence, nothing lost, nothing half-public.
"""

import ast
import traceback
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants

import flashkat_hf
from flashkat_hf.cli import main
from flashkat_hf.hub import destination, push

COMMIT, BATCH, PUT = "POST .*/commit/", "POST .*/objects/batch", "PUT /upload/"


def fails(arguments: list[str], capsys) -> str:
    """The one line that the command writes when it fails."""
    capsys.readouterr()
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"flashkat {arguments[0]}: ")
    assert error.count("\n") == 1
    return error.removeprefix(f"flashkat {arguments[0]}: ")


@pytest.mark.parametrize(
    ("pattern", "fault", "sentence"),
    [
        ("whoami", {"status": 401}, "does not accept the access token; log in again"),
        ("whoami", {"status": 500}, "the Hub has a problem (500) (injected); try again later"),
        (
            "GET /api/models/alice/micro",
            {"status": 403},
            "the access token gives no right to do this with alice/micro (injected)",
        ),
        (
            "repos/create",
            {"status": 403},
            "the access token gives no right to do this with alice/micro (injected)",
        ),
        ("preupload", {"status": 404}, "the Hub does not know what was asked for (injected)"),
        (COMMIT, {"status": 401}, "does not accept the access token"),
        (COMMIT, {"status": 403}, "the access token gives no right to do this with alice/micro (injected)"),
        (
            COMMIT,
            {"status": 404, "X_Error_Code": "RepoNotFound"},
            "alice/micro does not exist, or is private",
        ),
        (COMMIT, {"status": 409}, "the Hub reports a conflict (409) (injected); try again"),
        (COMMIT, {"status": 412}, "somebody else committed to alice/micro in the meantime"),
        (COMMIT, {"status": 413}, "the Hub refused it (413) (injected)"),
        (
            COMMIT,
            {"status": 429, "Retry_After": "3600"},
            "limits requests (429) (injected); try again in 3600 s",
        ),
        (COMMIT, {"status": 500, "times": 9}, "the Hub has a problem (500) (injected); try again later"),
        (COMMIT, {"status": 503, "times": 9}, "the Hub has a problem (503) (injected); try again later"),
        (COMMIT, {"kind": "cut", "times": 9}, "no connection to the Hub"),
        (BATCH, {"status": 403}, "the access token gives no right to do this with alice/micro (injected)"),
        (PUT, {"kind": "corrupt"}, "the Hub refused it (400) (checksum mismatch"),
        (PUT, {"kind": "cut", "times": 99}, "no connection to the Hub"),
        ("objects/verify", {"status": 422}, "the Hub refused it (422) (injected)"),
    ],
)
def test_a_push_that_fails(hub, model_folder, capsys, pattern, fault, sentence):
    """One line and exit code 1; the repository stands as it was; the same command again finishes it."""
    hub.fail(pattern, **fault)
    line = fails(["push", str(model_folder), "alice/micro"], capsys)
    print(line)
    assert line.startswith("cannot push to alice/micro: ")
    assert sentence in line
    assert set(hub.files("alice/micro")) <= {".gitattributes"}
    hub.faults.clear()
    assert main(["push", str(model_folder), "alice/micro"]) == 0
    assert hub.titles("alice/micro") == ["Upload FlashKAT", "initial commit"]


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("preupload", {"status": 429, "Retry_After": "7"}),
        (BATCH, {"status": 503, "times": 2}),
        (PUT, {"kind": "cut"}),
        (PUT, {"status": 500}),
        (COMMIT, {"status": 429, "Retry_After": "7"}),
        (COMMIT, {"status": 503, "times": 2}),
        (COMMIT, {"kind": "cut"}),
        (COMMIT, {"kind": "lost"}),
        ("repos/create", {"kind": "lost"}),
    ],
)
def test_a_push_that_recovers(hub, model_folder, pattern, fault):
    """Refusals that pass, and answers that are lost, end in exactly one commit.

    The Hub's wish to wait is heard.
    """
    hub.fail(pattern, **fault)
    push(model_folder, "alice/micro")
    assert hub.titles("alice/micro") == ["Upload FlashKAT", "initial commit"]
    assert hub.faults[0].times == 0
    if "Retry_After" in fault:
        assert 7 <= hub.waits[0] <= 8


def test_a_slow_hub(hub, model_folder, monkeypatch, capsys):
    """huggingface_hub would wait for ever. A late commit is found when its answer was given up."""
    monkeypatch.setattr(destination, "SILENCE", 0.4)
    hub.fail("whoami", kind="slow", seconds=5)
    assert "the Hub does not answer in time" in fails(["push", str(model_folder), "alice/micro"], capsys)
    hub.fail(COMMIT, kind="slow", seconds=0.6)
    monkeypatch.setattr("flashkat_hf.hub.upload.time.sleep", lambda seconds: hub.stopping.wait(0.4))
    push(model_folder, "alice/micro")
    assert hub.titles("alice/micro") == ["Upload FlashKAT", "initial commit"]


def test_no_network(hub, model_folder, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "no connection to the Hub" in fails(["push", str(model_folder), "alice/micro"], capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode; unset HF_HUB_OFFLINE" in fails(["push", str(model_folder), "alice/micro"], capsys)


def test_somebody_else_commits_meanwhile(hub, model_folder, monkeypatch, capsys):
    push(model_folder, "alice/micro")
    (model_folder / "notes.txt").write_text("new")
    commit = HfApi.create_commit

    def late(api, repo_id, operations, **settings):
        other = CommitOperationAdd("theirs.txt", b"theirs")
        commit(api, repo_id, [other], commit_message="Theirs")
        return commit(api, repo_id, operations, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", late)
        line = fails(["push", str(model_folder), "alice/micro"], capsys)
    assert "somebody else committed to alice/micro in the meantime; look at it and try again" in line
    assert hub.titles("alice/micro")[0] == "Theirs"
    assert "notes.txt" not in hub.files("alice/micro")
    push(model_folder, "alice/micro")
    assert {"notes.txt", "theirs.txt"} <= hub.files("alice/micro").keys()


def test_a_pull_request_is_not_opened_twice(hub, model_folder):
    """When the answer is lost it may be there; a refusal is tried again."""
    push(model_folder, "alice/micro")
    (model_folder / "notes.txt").write_text("new")
    hub.fail(COMMIT, kind="lost")
    with pytest.raises(ValueError, match="no connection to the Hub"):
        push(model_folder, "alice/micro", create_pr=True)
    refs = hub.repositories["models", "alice/micro"].refs
    assert "refs/pr/1" in refs
    hub.fail(COMMIT, status=503)
    push(model_folder, "alice/micro", create_pr=True)
    assert "refs/pr/3" not in refs


@pytest.mark.parametrize(
    ("repo", "options", "sentence"),
    [
        ("micro", "", "owner/name is expected"),
        ("alice/x--y", "", "Cannot have -- or .."),
        ("alice/.x", "", "cannot start or end with '-' or '.'"),
        ("alice/x.git", "", "cannot end by '.git'"),
        ("alice/x.ipynb", "", "without .git or .ipynb"),
        ("alice/" + "x" * 97, "", "maximum length is 96"),
        ("alice/b/c", "", "must be in the form"),
        ("alice/x y", "", "must use alphanumeric chars"),
        ("alice/ü", "", "must use alphanumeric chars"),
        ("", "", "must use alphanumeric chars"),
        ("alice/x", "--revision a..b", "cannot be the name of a branch"),
        ("alice/x", "--revision refs/heads/x", "cannot be the name of a branch"),
        ("alice/x", f"--revision {'a' * 40}", "is a commit; a branch is needed"),
        ("alice/x", "--revision x --pr", "a pull request is opened against main"),
    ],
)
def test_names_that_the_hub_refuses(hub, model_folder, capsys, repo, options, sentence):
    assert sentence in fails(["push", str(model_folder), repo, *options.split()], capsys)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "repo", "options", "sentence"),
    [
        ("", "alice/micro", "", "there is no access token; log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", "alice/micro", "", "the Hub does not accept the access token"),
        ("hf_reader", "alice/micro", "", "the access token of alice may only read"),
        (
            "hf_alice",
            "bob/micro",
            "",
            "gives no right to do this with bob/micro (You don't have write access to bob/micro)",
        ),
        ("hf_alice", "bob/none", "", "You don't have the rights to create a model under the namespace bob"),
        ("hf_alice", "bob/none", "--pr", "bob/none does not exist, or is private and not yours"),
        (
            "hf_alice",
            "alice/public",
            "--private",
            "it exists and is public; its settings on the Hub change that",
        ),
    ],
)
def test_accounts(hub, model_folder, monkeypatch, capsys, token, repo, options, sentence):
    """Refused before anything is sent or made."""
    hub.add("bob/micro")
    hub.add("alice/public")
    monkeypatch.setenv("HF_TOKEN", token)
    assert sentence in fails(["push", str(model_folder), repo, *options.split()], capsys)
    asked = ("GET /api/", "POST /api/repos/create", "POST /api/models/bob/micro/preupload/")
    assert all(line.startswith(asked) for line in hub.requests)
    assert len(hub.repositories) == 2


def test_an_organisation_that_the_account_does_not_list(hub, model_folder):
    """The Hub decides."""
    hub.users["hf_alice"]["listed"] = []
    for _ in range(2):
        push(model_folder, "kan-lab/micro", private=True)
    assert hub.titles("kan-lab/micro") == ["Upload FlashKAT", "initial commit"]
    assert hub.repositories["models", "kan-lab/micro"].private


def test_the_token_shows_nowhere(hub, model_folder, monkeypatch, capsys, caplog, tmp_path):
    """Neither printed, logged, written nor in tracebacks, though the server repeats it in every refusal."""
    token = "hf_" + "Secret" * 6
    hub.users[token] = hub.users.pop("hf_alice")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    for logger in ("huggingface_hub", "flashkat_hf"):
        caplog.set_level("DEBUG", logger)
    traces = []
    for pattern, status in (
        ("whoami", 401),
        ("repos/create", 400),
        ("preupload", 503),
        (BATCH, 403),
        (COMMIT, 401),
    ):
        hub.fail(pattern, status=status, times=99, message=f"Bearer {token} is refused")
        assert main(["push", str(model_folder), "alice/micro"]) == 1
        try:
            push(model_folder, "alice/micro")
        except ValueError:
            traces.append(traceback.format_exc())
        hub.faults.clear()
        hub.repositories.clear()
        hub.blobs.clear()
    push(model_folder, "alice/micro")
    (model_folder / "settings.json").write_text(f'{{"environment": "HF_TOKEN={token}"}}')
    assert "settings.json holds an access token" in fails(["push", str(model_folder), "alice/micro"], capsys)
    (model_folder / "settings.json").unlink()
    output = capsys.readouterr()
    assert len(traces) == 5
    assert token not in "".join([output.out, output.err, caplog.text, *traces])
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes(), path
    assert all(token.encode() not in data for data in hub.files("alice/micro").values())


def test_no_command_takes_a_token(capsys):
    for command in ("push", "publish", "convert", "info"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--token" not in capsys.readouterr().out


def test_trust_remote_code_is_never_switched_on():
    """In no call of the package, the examples or the scripts."""
    root = Path(flashkat_hf.__file__).parent.parent
    paths = [
        path for folder in ("flashkat_hf", "examples", "scripts") for path in (root / folder).rglob("*.py")
    ]
    assert len(paths) > 20
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path
            if isinstance(node, ast.Dict):
                keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
                assert "trust_remote_code" not in keys, path
