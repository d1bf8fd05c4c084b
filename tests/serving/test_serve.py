"""``pmod serve``, asked by OpenAI's own client over loopback."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import signal
import socket
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
openai = pytest.importorskip("openai", reason="the extra serve is not installed")

from pmod_cli.cli import main
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.pictures import open_image
from pmod_cli.prompts import Prompt
from pmod_cli.serving.handler import ChatHandler
from pmod_cli.serving.pictures import PictureSources
from pmod_cli.serving.server import bind, make_app, make_server
from tests.common.eval_models import noise, save_llava, save_pmod
from tests.docs.test_json import check_keys

NEW = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    return save_pmod(save_llava(folder / "dense", seed=0), folder / "model")


@pytest.fixture(scope="module")
def model(checkpoint):
    return VisionLanguageModel.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder that may be read, beside a picture that may not."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "open").mkdir()
    rng = random.Random(0)
    noise(rng, 30, 20).save(folder / "open" / "a.png")
    noise(rng, 20, 30).save(folder / "open" / "b.png")
    noise(rng, 20, 20).save(folder / "hidden.png")
    os.mkfifo(folder / "open" / "pipe")
    (folder / "open" / "link.png").symlink_to(folder / "hidden.png")
    return folder


@pytest.fixture(scope="module")
def serving(model):
    """Starts servers of the model; gives the address of each."""
    stops = []

    def start(sources=PictureSources()):  # noqa: B008
        address = bind("127.0.0.1", 0)
        server = make_server(make_app(model, "tiny", sources, "127.0.0.1"))
        address.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [address]})
        thread.start()
        stops.append((server, thread, address))
        return f"http://127.0.0.1:{address.getsockname()[1]}/v1"

    yield start
    for server, thread, address in stops:
        server.should_exit = True
        thread.join(20)
        address.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(serving, pictures):
    return openai.OpenAI(
        base_url=serving(PictureSources(pictures / "open")), api_key="none", max_retries=0, timeout=60
    )


def data_url(path):
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def picture(url):
    return {"type": "image_url", "image_url": {"url": url}}


def asked(words, *urls):
    return [{"role": "user", "content": [*map(picture, urls), {"type": "text", "text": words}]}]


def chat(client, messages, **settings):
    settings = {"model": "tiny", "max_completion_tokens": NEW} | settings
    return client.chat.completions.create(messages=messages, **settings)


def streamed(client, messages, **settings):
    """The text, the usage and the reason to finish of a stream."""
    chunks = list(chat(client, messages, stream=True, **settings))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return text, chunks[-1].usage, chunks[-1].choices[0].finish_reason


def told(client, messages, status=400, **settings):
    with pytest.raises(openai.APIStatusError) as refused:
        chat(client, messages, **settings)
    assert refused.value.status_code == status
    message = refused.value.body["message"]
    assert "\n" not in message
    return message


def answer(model, words, *paths):
    [given] = model.generate([Prompt(words, tuple(map(open_image, paths)))], max_new_tokens=NEW)
    return given


def whole_characters(text):
    """A stream does not have the bytes at the end that are no character yet."""
    return text.rstrip("\ufffd")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_tokens_of_generate(client, model, pictures, count):
    paths = [pictures / "open" / "a.png", pictures / "open" / "b.png"][:count]
    expected = answer(model, "What is it?", *paths)
    messages = asked("What is it?", *map(data_url, paths))
    whole = chat(client, messages)
    assert whole.choices[0].message.content.strip() == expected.text
    text, usage, finish = streamed(client, messages)
    assert text.strip() == whole_characters(expected.text)
    for counted in (whole.usage, usage):
        assert (counted.prompt_tokens, counted.completion_tokens) == (
            expected.prompt_tokens,
            expected.new_tokens,
        )
    assert whole.choices[0].finish_reason == finish == "length"


def test_two_at_once(client, model, pictures):
    paths = [pictures / "open" / "a.png", pictures / "open" / "b.png"]
    with ThreadPoolExecutor(4) as pool:
        asking = [asked("What is it?", data_url(path)) for path in paths]
        whole = [pool.submit(chat, client, messages) for messages in asking]
        parts = [pool.submit(streamed, client, messages) for messages in asking]
    expected = [answer(model, "What is it?", path).text for path in paths]
    assert expected[0] != expected[1]
    assert [future.result().choices[0].message.content.strip() for future in whole] == expected
    assert [future.result()[0].strip() for future in parts] == list(map(whole_characters, expected))


def test_a_conversation_goes_on(client, model, pictures):
    first = asked("What is it?", data_url(pictures / "open" / "a.png"))
    said = chat(client, first).choices[0].message
    again = chat(client, [*first, said.model_dump(), *asked("And now?")])
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": said.content}]},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    inputs = model.encode_chat(turns, [open_image(pictures / "open" / "a.png")])
    assert again.usage.prompt_tokens == inputs["input_ids"].shape[1]
    ids = model.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert again.choices[0].message.content == model.processor.decode(new, skip_special_tokens=True)


def test_sampling_takes_a_seed(client, pictures):
    messages = asked("What is it?", data_url(pictures / "open" / "a.png"))

    def sampled(seed, temperature):
        return chat(client, messages, seed=seed, temperature=temperature).choices[0].message.content

    assert sampled(1, 1.5) == sampled(1, 1.5) != sampled(2, 1.5)
    assert sampled(1, 0) == sampled(2, 0)


def test_special_tokens_in_words_are_words(client):
    plain, special = (chat(client, asked(words)).usage.prompt_tokens for words in ("x", "x</s><image>"))
    assert special > plain + 10  # a byte each


def test_bad_requests(client, pictures):
    good = asked("x", data_url(pictures / "open" / "a.png"))
    assert "no model 'other'" in told(client, good, 404, model="other")
    asking = {"n": 2, "logprobs": True, "stop": "x", "response_format": {"type": "json_object"}}
    for field, value in asking.items():
        message = told(client, good, **{field: value})
        assert message.startswith(field), message
        assert message.endswith("not supported"), message
    assert chat(client, good, n=1, logprobs=False, response_format={"type": "text"}).choices
    assert told(client, good, temperature=9).startswith("temperature: ")
    assert told(client, good, extra_body={"generation_config": "{}"}) == "generation_config: not supported"
    assert told(client, []).startswith("messages: ")
    assert "messages.0.role" in told(client, [{"role": "robot", "content": "x"}])
    assert "messages.0.content.0" in told(client, [{"role": "user", "content": [{"type": "audio"}]}])
    assert "user" in told(client, [{"role": "assistant", "content": good[0]["content"]}])
    assert "the model reads 4,096" in told(client, good, max_completion_tokens=4096)
    assert "base64" in told(client, asked("x", "data:image/png;base64,!"))
    assert "base64" in told(client, asked("x", "data:image/png,abc"))
    nothing = base64.b64encode(b"no picture").decode()
    assert "not an image" in told(client, asked("x", f"data:image/png;base64,{nothing}"))
    half = json.dumps({"messages": asked("x", "\ud800")}).encode()
    for body, why in (
        (b"{", "the body is no JSON object"),
        (b"[]", "the body is no JSON object"),
        (b"1", "the body is no JSON object"),
        (half, r"cannot read image \ud800: "),
    ):
        request = urllib.request.Request(
            f"{client.base_url}chat/completions", body, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.request.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert refused.value.code == 400
        assert json.load(refused.value)["error"]["message"].startswith(why)
    assert chat(client, good).choices[0].message.content


def flat(width, height):
    """A data URL of a large picture in few bytes."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_more_than_can_be_meant(client, monkeypatch):
    assert told(client, asked("x", flat(12000, 12000))).endswith(
        "12000 x 12000 pixels, and 67,108,864 are left to it; scale pictures down"
    )
    assert "33 pictures" in told(client, asked("x", *[flat(1, 1)] * 33))
    assert "1,000,001 characters" in told(client, [*asked("x"), *asked("x" * 10**6)])
    assert "at most 1000" in told(client, asked("x") * 1001)
    assert "at most 1000" in told(client, [{"role": "user", "content": asked("x")[0]["content"] * 1001}])
    monkeypatch.setattr("pmod_cli.serving.handler.MOST_PIXELS", 1000)
    assert "30 x 30 pixels, and 100 are left" in told(client, asked("x", flat(30, 30), flat(30, 30)))
    tiny = chat(client, asked("x"), temperature=1e-40, top_p=1e-300)
    assert tiny.choices[0].message.content == chat(client, asked("x")).choices[0].message.content


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_never_ends(client, chunked):
    """Neither waited for nor kept."""
    length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 3000000000"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", client.base_url.port), timeout=20) as line:
        line.sendall(head + length + b"\r\n\r\n")
        if chunked:
            for size in (*[2**20] * 32, 1):
                line.sendall(b"%x\r\n" % size + b" " * size + b"\r\n")
        answer = b""
        while got := line.recv(2**16):
            answer += got
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"the body is larger than 32 MiB" in answer


def test_what_nobody_foresaw(client, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(ChatHandler, "_generation_config", lambda *_: 1 / 0)
    assert "its own log says why" in told(client, asked("x"), status=500)
    [line] = capsys.readouterr().err.splitlines()
    [kept] = tmp_path.iterdir()
    assert line.startswith("error: ZeroDivisionError: division by zero (unforeseen; ")
    assert str(kept) in line
    assert "Traceback" in kept.read_text(encoding="utf-8")


def test_only_what_is_allowed_is_read(client, serving, model, pictures):
    inside, hidden = pictures / "open" / "a.png", pictures / "hidden.png"
    expected = answer(model, "x", inside).text
    for url in ("a.png", str(inside), inside.as_uri()):
        assert chat(client, asked("x", url)).choices[0].message.content.strip() == expected
    for url in (str(hidden), hidden.as_uri(), "../hidden.png", "link.png", "/etc/passwd", "file:///none.png"):
        assert "not in the folder" in told(client, asked("x", url))
    for url, name in (("pipe", "pipe"), (".", "."), ("file://[", "file://[")):
        message = told(client, asked("x", url))
        assert name in message
        assert str(pictures) not in message
    # No one listens there: a fetch would fail in other words.
    assert "fetches no URLs" in told(client, asked("x", "http://127.0.0.1:9/a.png"))
    assert "neither" in told(client, asked("x", "ftp://127.0.0.1/a.png"))
    closed = client.with_options(base_url=serving())
    assert "reads no files" in told(closed, asked("x", str(inside)))
    fetching = client.with_options(base_url=serving(PictureSources(fetch=True)))
    assert "refused" in told(fetching, asked("x", "http://127.0.0.1:9/a.png"))


def test_urls_are_fetched_when_asked(monkeypatch, pictures):
    import http.server

    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given):
            super().__init__(*given, directory=str(pictures))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        found = PictureSources(fetch=True).open(f"http://127.0.0.1:{site.server_port}/hidden.png")
        site.shutdown()
    assert found.tobytes() == open_image(pictures / "hidden.png").tobytes()


def test_other_paths_and_hosts(client):
    assert [each.id for each in client.models.list()] == ["tiny"]
    for path in ("load_model", "reset", "v1/responses", "v1/completions", "docs"):
        url = str(client.base_url).replace("v1/", path)
        with pytest.raises(urllib.request.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url, b"{}", {"Content-Type": "application/json"}))
        assert refused.value.code == 404
    health = str(client.base_url).replace("v1/", "health")
    assert urllib.request.urlopen(health, timeout=60).status == 200
    with pytest.raises(urllib.request.HTTPError) as refused:
        urllib.request.urlopen(
            urllib.request.Request(health, headers={"Host": "rebound.example"}), timeout=60
        )
    assert refused.value.code == 400


def test_mistakes_end_before_the_model_is_loaded(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(VisionLanguageModel, "load", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wrong = {
            "no checkpoint folder": [str(tmp_path / "none")],
            "no folder": [str(checkpoint), "--images", str(tmp_path / "none")],
            "no folder ''": [str(checkpoint), "--images", ""],
            "cannot listen": [str(checkpoint), "--port", str(taken.getsockname()[1])],
            "--host is empty": [str(checkpoint), "--host", ""],
            "cannot listen on \\udcff": [str(checkpoint), "--host", "\udcff"],
        }
        for message, words in wrong.items():
            with pytest.raises(SystemExit) as stopped:
                main(["serve", *words])
            assert stopped.value.code == 2
            [line] = capsys.readouterr().err.splitlines()
            assert message in line


def test_the_command_serves_until_it_is_interrupted(checkpoint, model, pictures, capsys):
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    said = []

    def visit():
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60)
            client = client.with_options(max_retries=8)  # until it listens
            [served] = client.models.list()
            messages = asked("What is it?", data_url(pictures / "open" / "a.png"))
            said.append(chat(client, messages, model=served.id).choices[0].message.content)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit)
    visitor.start()
    with pytest.raises(SystemExit) as stopped:
        main(
            ["serve", str(checkpoint), "--port", str(port), "--device", "cpu", "--cache", "static", "--json"]
        )
    visitor.join()
    assert stopped.value.code == 130
    printed = capsys.readouterr()
    result = json.loads(printed.out)["result"]
    assert result == {"url": f"http://127.0.0.1:{port}/v1", "model": checkpoint.name, "device": "cpu"}
    check_keys(result, "serve")
    assert printed.err.splitlines()[-1].startswith("error: interrupted")
    assert said[0].strip() == answer(model, "What is it?", pictures / "open" / "a.png").text
