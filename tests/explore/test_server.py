"""What the explorer's server gives out, and to whom, asked as a stranger would ask."""

import http.client
import json
import re
import signal
import socket
import sys

import numpy as np
import pytest

from .conftest import HOSTILE, serving


def ask(port, path, method="GET", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in ({"Host": f"127.0.0.1:{port}"} | headers).items():
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def test_the_page_and_its_parts_are_served_with_a_policy(port):
    status, page, headers = ask(port, "/")
    assert status == 200
    for part in re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page.decode()):
        assert ask(port, f"/{part}")[0] == 200, part
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["x-content-type-options"] == "nosniff"


def test_points_clusters_and_pictures(port, explorer):
    about = json.loads(ask(port, "/about")[1])
    assert about["count"] == len(explorer)
    assert (about["unreadable"], about["takes_words"], about["has_model"]) == (1, False, True)
    points = np.frombuffer(ask(port, "/points?map=PCA")[1], "<u2").reshape(-1, 2)
    np.testing.assert_array_equal(points, explorer.analysis.maps["PCA"])
    clusters = np.frombuffer(ask(port, "/clusters")[1], "<u2")
    assert np.bincount(clusters).tolist() == [one["count"] for one in about["clusters"]]
    status, picture, headers = ask(port, "/image/3?side=96")
    assert (status, picture[:2], headers["content-type"]) == (200, b"\xff\xd8", "image/jpeg")
    assert headers["cache-control"] == "no-store"  # another set may have the same address next
    names = [json.loads(ask(port, f"/name/{row}")[1])["name"] for row in range(len(explorer))]
    (hostile,) = (name for name in names if "onerror" in name)
    assert hostile == HOSTILE.replace("</", "<|").replace("\x07", "\\x07").replace("\x1b", "\\x1b") + ".png"


@pytest.mark.parametrize(
    "path",
    [
        *("/image/../../../etc/passwd", "/image/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/image//etc/passwd"),
        *("/image/-1", "/image/67", "/image/99999999999999999999", "/image/1.5", "/image/broken.png"),
        "/near/" + "9" * 5000,
        *("/image/0?side=97", "/../explore.js", "/..%2fserver.py", "/server.py", "/explorer.py", "/name/-1"),
        *("/near/67", "/points?map=../x", "//etc/passwd", "/image/0/../../x", "/%00"),
    ],
)
def test_nothing_but_images_of_the_set_is_given_out(port, path):
    status, body, _ = ask(port, path)
    assert status in (400, 404), (status, body[:80])
    assert b"root:" not in body
    assert b"import" not in body


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/files.txt", b'{"rows": ["../../etc/passwd"]}'),
        ("/files.txt", b'{"rows": [true]}'),
        ("/files.txt", b'{"rows": [-1]}'),
        ("/files.txt", b"[" * 100_000),
        ("/labels.csv", b'{"given": [[0, ""]]}'),
        ("/labels.csv", b'{"given": [[999, "a"]]}'),
        ("/spread", b'{"given": [[0, 1]]}'),
        ("/spread", b'{"given": [[0, "a"]], "least": 2}'),
        ("/near", b"no image"),
    ],
)
def test_what_cannot_be_answered_is_told_in_one_line(port, path, body):
    status, told, _ = ask(port, path, "POST", body)
    assert status in (400, 404)
    assert json.loads(told)["error"]


def test_a_name_that_somebody_pointed_here_is_refused(port):
    assert ask(port, "/about", Host=f"evil.example:{port}")[0] == 403
    assert ask(port, "/image/0", Host="127.0.0.1.evil.example")[0] == 403
    assert ask(port, "/about", Host=f"localhost:{port}")[0] == 200
    assert ask(port, "/about", Host=f"127.0.0.2:{port}")[0] == 200  # of `--host 127.0.0.2`
    for own in ("[::1]", f"[::1]:{port}", "LOCALHOST", f"LocalHost:{port}"):
        assert ask(port, "/about", Host=own)[0] == 200, own


def test_what_a_page_of_another_site_asks_is_refused_but_not_its_link(port):
    """It could not read an answer, yet have anything decoded, and the model run, as often as it likes."""
    own = {"Origin": f"http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}
    assert ask(port, "/files.txt", "POST", b'{"rows": [0]}', **own)[0] == 200
    for foreign in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert ask(port, "/files.txt", "POST", b'{"rows": [0]}', **foreign)[0] == 403, foreign
    assert ask(port, "/image/0", **{"Sec-Fetch-Site": "same-site"})[0] == 403
    assert ask(port, "/", **{"Sec-Fetch-Site": "cross-site"})[0] == 200


def test_with_a_token_nothing_is_answered_without_it(explorer):
    with serving(explorer, "right") as port:
        for path in (
            "/",
            "/about",
            "/image/0",
            "/page.css",
            "/?token=wrong",
            "/about?token=",
            "/about?token=wr%C3%B6ng",
        ):
            assert ask(port, path)[0] == 403, path
        assert ask(port, "/files.txt", "POST", b'{"rows": [0]}')[0] == 403
        status, _, headers = ask(port, "/?token=right", Host="another.machine")
        assert status == 303
        assert "token" not in headers["location"]
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        for path in ("/", "/about", "/image/0"):
            assert ask(port, path, Cookie=cookie.split(";")[0])[0] == 200
            assert ask(port, path, Cookie=f"{cookie.split('=')[0]}=wrong")[0] == 403
        assert ask(port, "/about?token=right")[0] == 200
        with serving(explorer, "other") as other:  # cookies are of a machine, whatever the port
            second = ask(other, "/?token=other")[2]["set-cookie"].split(";")[0]
            both = f"{cookie.split(';')[0]}; {second}"
            assert second.split("=")[0] != cookie.split("=")[0]
            assert [ask(one, "/about", Cookie=both)[0] for one in (port, other)] == [200, 200]


@pytest.mark.slow
def test_the_command_takes_the_next_port_says_so_and_ends_when_asked(images, encoder, tmp_path, run_process):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["explore", images, encoder, "--port", port, "--num_workers", "0"]
        command = [sys.executable, "-m", "hf_vicreg.cli", *words]
        first = run_process.start(command, HF_HOME=str(tmp_path / "home"))
        line = first.stdout.readline()
        found = int(re.search(r"http://127\.0\.0\.1:(\d+)/$", line.strip())[1])
        assert port < found < port + 20
        second = run_process.start([*command, "--host", "0.0.0.0"], HF_HOME=str(tmp_path / "home"))
        other, token = re.search(r":(\d+)/\?token=([\w-]{20,})$", second.stdout.readline().strip()).groups()
        assert int(other) > found  # both have the same index open
        assert ask(found, "/near/3")[1] == ask(int(other), f"/near/3?token={token}")[1]
        assert ask(int(other), "/near/3")[0] == 403
        for process in (first, second):
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            assert token not in err
            assert "Traceback" not in err
            assert f"port {port} is in use" in err
