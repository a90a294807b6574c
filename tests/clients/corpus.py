"""Requests of real clients, each sent to an engine and through the gateway, and what the client makes of the answers.

    corpus.py ENGINE GATEWAY      (http://host:port)

prints a JSON object: the name of each case, and for `engine` and `gateway` what the client parsed. Values that differ from
answer to answer (ids, times, cached tokens) are left out.
"""

import base64
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["LITELLM_LOG"] = "ERROR"

import anthropic  # noqa: E402
import litellm  # noqa: E402
import openai  # noqa: E402
import pydantic  # noqa: E402

litellm.telemetry = False
litellm.suppress_debug_info = True

VOLATILE = {
    "id", "created", "created_at", "completed_at", "cached_tokens", "prompt_tokens_details", "input_tokens_details",
    "cache_read_input_tokens", "cache_creation_input_tokens", "item_id", "request_id", "_request_id", "kv_transfer_params",
    "_hidden_params", "_response_ms", "permission",
}
# Long enough to be split into two legs.
LONG = "A long text that both clients send. " * 160
PNG = base64.b64encode(bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010804000000b51c0c020000000b4944415478da6364f80f000105010127"
    "18e3660000000049454e44ae426082"
)).decode()
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
CLAUDE_TOOL = {
    "name": "weather",
    "description": "The weather of a town",
    "input_schema": TOOL["function"]["parameters"],
    "cache_control": {"type": "ephemeral"},
}
MARK = {"cache_control": {"type": "ephemeral"}}


class Said(pydantic.BaseModel):
    """What the simulator answers where a schema is asked for."""

    said: str


def plain(value):
    """What is stable of a parsed answer."""
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key not in VOLATILE}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(type(value))


def plain_or_list(answer):
    """A whole answer, or all parts of a stream."""
    return plain(answer if hasattr(answer, "model_dump") else list(answer))


def user(content):
    return [{"role": "user", "content": content}]


def openai_cases(base):
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=20)
    chat = lambda **more: client.chat.completions.create(**{"model": "sim", "max_tokens": 12, **more})  # noqa: E731

    def turns(**more):
        messages = [{"role": "system", "content": LONG}]
        for question in ("one", "two", "three"):
            messages.append({"role": "user", "content": question})
            answer = chat(messages=messages, **more)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        return messages

    def cancelled():
        stream = chat(messages=user(LONG + "cancel"), max_tokens=2000, stream=True)
        first = next(iter(stream))
        stream.close()
        return [plain(first), plain(chat(messages=user("after")))]

    def refused(**more):
        return status(lambda: chat(messages=user("x"), **more))

    def status(call):
        try:
            call()
        except openai.APIStatusError as error:
            return [type(error).__name__, error.status_code]
        return "no error"

    def agent(stream):
        """Turns of an agent: a call of a tool, its result, an answer."""
        messages = user(LONG + "How is the weather?")
        seen = []
        for choice in ("required", "none"):
            answer = chat(messages=messages, tools=[TOOL], tool_choice=choice, stream=stream)
            if stream:
                parts = list(answer)
                deltas = [call for part in parts for call in part.choices[0].delta.tool_calls or []]
                calls = [{"id": deltas[0].id, "type": "function", "function": {
                    "name": deltas[0].function.name,
                    "arguments": "".join(delta.function.arguments for delta in deltas)}}] if deltas else []
                seen.append(plain(parts))
            else:
                calls = [call.model_dump() for call in answer.choices[0].message.tool_calls or []]
                seen.append(plain(answer))
            for call in calls:
                json.loads(call["function"]["arguments"])
                messages += [{"role": "assistant", "content": None, "tool_calls": [call]},
                             {"role": "tool", "tool_call_id": call["id"], "content": "rain"}]
        assert len(messages) == 3, messages
        return seen

    tool_turn = [
        {"role": "user", "content": LONG + "How is the weather?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"town":"Ulm"}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": {
        "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}}}
    picture = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "http://pictures.example/a.png"}},
    ]
    sound = [
        {"type": "text", "text": "What is said?"},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF" * 500).decode(), "format": "wav"}},
    ]
    for size, text in (("short", "Hello"), ("long", LONG)):
        yield f"chat {size}", lambda text=text: chat(messages=user(text))
        yield f"chat {size} stream", lambda text=text: list(
            chat(messages=user(text), stream=True, stream_options={"include_usage": True}))
        yield f"completion {size}", lambda text=text: client.completions.create(model="sim", prompt=text, max_tokens=9)
        yield f"completion {size} stream", lambda text=text: list(
            client.completions.create(model="sim", prompt=text, max_tokens=9, stream=True))
        yield f"response {size}", lambda text=text: client.responses.create(model="sim", input=text, max_output_tokens=9)
        yield f"response {size} stream", lambda text=text: list(
            client.responses.create(model="sim", input=text, max_output_tokens=9, stream=True))
    yield "chat tools", lambda: chat(messages=tool_turn, tools=[TOOL], tool_choice="auto", parallel_tool_calls=False)
    yield "chat tools stream", lambda: list(chat(messages=tool_turn, tools=[TOOL], stream=True))
    for stream in (False, True):
        kind = " stream" if stream else ""
        yield f"agent{kind}", lambda stream=stream: agent(stream)
        yield f"chat named tool{kind}", lambda stream=stream: plain_or_list(chat(
            messages=user("Hello"), tools=[TOOL], stream=stream,
            tool_choice={"type": "function", "function": {"name": "weather"}}))
        yield f"response tool call{kind}", lambda stream=stream: plain_or_list(client.responses.create(
            model="sim", input=LONG, stream=stream, max_output_tokens=9, tool_choice="required",
            tools=[{"type": "function", "name": "weather", "parameters": TOOL["function"]["parameters"], "strict": False}]))
        yield f"chat structured{kind} text", lambda stream=stream: plain_or_list(chat(
            messages=user(LONG + "a schema"), response_format=schema, stream=stream))
        yield f"chat image{kind} long", lambda stream=stream: plain_or_list(chat(
            messages=user([{"type": "text", "text": LONG}, *picture]), stream=stream))
        yield f"chat audio{kind} long", lambda stream=stream: plain_or_list(chat(
            messages=user([{"type": "text", "text": LONG}, *sound]), stream=stream))
    yield "chat file", lambda: chat(messages=user([{"type": "text", "text": LONG}, {"type": "file", "file": {
        "filename": "a.pdf", "file_data": "data:application/pdf;base64," + base64.b64encode(b"%PDF-1.4" * 500).decode()}}]))
    yield "response image", lambda: client.responses.create(model="sim", max_output_tokens=9, input=[
        {"role": "user", "content": [{"type": "input_text", "text": LONG}, {
            "type": "input_image", "image_url": f"data:image/png;base64,{PNG}", "detail": "low"}]}])
    yield "response structured stream", lambda: list(client.responses.create(
        model="sim", input=LONG, stream=True, max_output_tokens=30, text={"format": {
            "type": "json_schema", "name": "answer", "schema": schema["json_schema"]["schema"], "strict": True}}))
    yield "chat parsed", lambda: client.chat.completions.parse(
        model="sim", messages=user(LONG + "parse"), response_format=Said).choices[0].message.parsed
    yield "response parsed", lambda: client.responses.parse(
        model="sim", input=LONG + "parse", text_format=Said).output_parsed
    yield "chat image", lambda: chat(messages=user(picture))
    yield "chat audio", lambda: chat(messages=user(sound))
    yield "chat structured", lambda: chat(messages=user(LONG + "a number"), response_format=schema)
    yield "chat several", lambda: chat(messages=user("several"), n=2, temperature=0.7, seed=2**53 + 1, stop=["zzz"])
    yield "chat extra", lambda: chat(
        messages=user(LONG + "extra"), user="u", metadata={"a": "b"}, logit_bias={"5": 1}, extra_body={"top_k": 5},
        extra_headers={"x-session-id": "corpus"})
    yield "chat turns", turns
    yield "chat cancelled", cancelled
    yield "chat batch", lambda: client.post("/chat/completions/batch", cast_to=object, body={
        "model": "sim", "max_tokens": 5, "messages": [user("a"), user(LONG)]})
    yield "completion batch stream", lambda: list(client.completions.create(
        model="sim", prompt=["a", LONG], max_tokens=5, stream=True))
    yield "batch of a file", lambda: status(lambda: client.batches.create(
        input_file_id="file-1", endpoint="/v1/chat/completions", completion_window="24h"))
    yield "file", lambda: status(lambda: client.files.create(file=("a.jsonl", b"{}"), purpose="batch"))
    yield "image", lambda: client.images.generate(model="sim", prompt=LONG)
    yield "image edit", lambda: client.images.edit(
        model="sim", prompt="blue", image=("a.png", base64.b64decode(PNG), "image/png"))
    yield "translation", lambda: client.audio.translations.create(model="sim", file=("a.wav", b"RIFF" * 2000, "audio/wav"))
    yield "completion batch", lambda: client.completions.create(model="sim", prompt=["a", "b", LONG], max_tokens=5)
    yield "response tools", lambda: client.responses.create(
        model="sim", input=[{"role": "user", "content": [{"type": "input_text", "text": LONG}]}], instructions="Be brief",
        tools=[{"type": "function", "name": "weather", "parameters": TOOL["function"]["parameters"], "strict": False}],
        max_output_tokens=9)
    yield "embeddings", lambda: client.embeddings.create(model="sim", input=["a", "b"])
    yield "embeddings floats", lambda: client.embeddings.create(model="sim", input=LONG, encoding_format="float")
    yield "transcription", lambda: client.audio.transcriptions.create(
        model="sim", file=("a.wav", b"RIFF" * 2000, "audio/wav"), language="de", response_format="json")
    yield "models", lambda: list(client.models.list())
    yield "unknown model", lambda: refused(model="no-such-model")


def anthropic_cases(base):
    client = anthropic.Anthropic(base_url=base, api_key="none", max_retries=0, timeout=20)
    send = lambda **more: client.messages.create(**{"model": "sim", "max_tokens": 12, **more})  # noqa: E731

    def streamed(**more):
        with client.messages.stream(model="sim", max_tokens=12, **more) as stream:
            text = "".join(stream.text_stream)
            return [text, plain(stream.get_final_message())]

    def turns():
        system = [{"type": "text", "text": LONG, **MARK}]
        messages = []
        for question in ("one", "two", "three"):
            for message in messages:
                if isinstance(message["content"], list):
                    message["content"] = message["content"][0]["text"]
            messages.append({"role": "user", "content": [{"type": "text", "text": question, **MARK}]})
            answer = send(system=system, messages=messages, tools=[CLAUDE_TOOL])
            messages.append({"role": "assistant", "content": answer.content[0].text})
        return messages

    def refused():
        try:
            send(model="no-such-model", messages=user("x"))
        except anthropic.APIStatusError as error:
            return [type(error).__name__, error.status_code]
        return "no error"

    def status(call):
        try:
            call()
        except anthropic.APIStatusError as error:
            return [type(error).__name__, error.status_code]
        return "no error"

    def agent(streams):
        """Turns of an agent: a call of a tool, its result, an answer."""
        messages = user([{"type": "text", "text": LONG, **MARK}])
        seen = []
        for choice in ({"type": "any"}, {"type": "none"}):
            asked = {"model": "sim", "max_tokens": 12, "messages": messages, "tools": [CLAUDE_TOOL], "tool_choice": choice}
            if streams:
                with client.messages.stream(**asked) as stream:
                    answer = stream.get_final_message()
            else:
                answer = client.messages.create(**asked)
            seen.append(plain(answer))
            for part in answer.content:
                if part.type == "tool_use":
                    messages = messages + [
                        {"role": "assistant", "content": [part.model_dump(include={"type", "id", "name", "input"})]},
                        {"role": "user", "content": [
                            {"type": "tool_result", "tool_use_id": part.id, "content": "rain", **MARK}]}]
        assert len(messages) == 3, messages
        return seen

    picture = [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
        {"type": "text", "text": "What is this?"},
    ]
    document = {"type": "document", "title": "a", "source": {
        "type": "base64", "media_type": "application/pdf", "data": base64.b64encode(b"%PDF-1.4" * 500).decode()}}
    tool_turn = [
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"town": "Ulm"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain", **MARK}]},
    ]
    for size, text in (("short", "Hello"), ("long", LONG)):
        yield f"message {size}", lambda text=text: send(messages=user(text))
        yield f"message {size} stream", lambda text=text: streamed(messages=user(text))
    yield "message tools", lambda: send(messages=tool_turn, tools=[CLAUDE_TOOL], tool_choice={"type": "auto"})
    yield "agent", lambda: agent(False)
    yield "agent stream", lambda: agent(True)
    yield "message named tool", lambda: send(
        messages=user("Hello"), tools=[CLAUDE_TOOL], tool_choice={"type": "tool", "name": "weather"})
    yield "message structured", lambda: send(
        messages=user(LONG), extra_body={"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}})
    yield "message structured stream", lambda: streamed(
        messages=user(LONG), extra_body={"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}})
    yield "message document", lambda: send(messages=user([document, {"type": "text", "text": LONG}]))
    yield "message document stream", lambda: streamed(messages=user([document, {"type": "text", "text": LONG}]))
    yield "message tool result with an image", lambda: send(messages=[*tool_turn[:2], {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": picture[:1]}]}], tools=[CLAUDE_TOOL])
    yield "message image", lambda: send(messages=user(picture))
    yield "message image stream", lambda: streamed(messages=user([{"type": "text", "text": LONG}, *picture]))
    yield "batch", lambda: status(lambda: client.messages.batches.create(requests=[
        {"custom_id": "a", "params": {"model": "sim", "max_tokens": 4, "messages": user("x")}}]))
    yield "message turns", turns
    yield "count tokens", lambda: client.messages.count_tokens(model="sim", messages=user(LONG))
    yield "unknown model", refused


def litellm_cases(base):
    common = {"api_key": "none", "num_retries": 0, "timeout": 20, "max_tokens": 12}
    ours = {**common, "model": "hosted_vllm/sim", "api_base": f"{base}/v1"}
    claude = {**common, "model": "anthropic/sim", "api_base": base}
    marked = user([{"type": "text", "text": LONG, **MARK}, {"type": "text", "text": "and this"}])
    for size, text in (("short", "Hello"), ("long", LONG)):
        yield f"completion {size}", lambda text=text: litellm.completion(messages=user(text), **ours)
        yield f"completion {size} stream", lambda text=text: list(litellm.completion(messages=user(text), stream=True, **ours))
        yield f"claude {size}", lambda text=text: litellm.completion(messages=user(text), **claude)
    yield "tools", lambda: litellm.completion(messages=user(LONG), tools=[TOOL], **ours)
    for where, to in (("", ours), ("claude ", claude)):
        yield f"{where}tool call", lambda to=to: litellm.completion(
            messages=user(LONG), tools=[TOOL], tool_choice="required", **to)
        yield f"{where}tool call stream", lambda to=to: list(litellm.completion(
            messages=user(LONG), tools=[TOOL], tool_choice="required", stream=True, **to))
    yield "structured", lambda: litellm.completion(messages=user(LONG), response_format=Said, **ours)
    yield "batch", lambda: litellm.batch_completion(messages=[user("a"), user(LONG)], **ours)
    yield "image", lambda: litellm.completion(messages=user([
        {"type": "text", "text": LONG}, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}]), **ours)
    picture = [{"type": "text", "text": LONG}, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}]
    sound = [{"type": "text", "text": LONG}, {"type": "input_audio", "input_audio": {
        "data": base64.b64encode(b"RIFF" * 500).decode(), "format": "wav"}}]
    yield "image stream", lambda: list(litellm.completion(messages=user(picture), stream=True, **ours))
    yield "claude image", lambda: litellm.completion(messages=user(picture), **claude)
    yield "audio", lambda: litellm.completion(messages=user(sound), **ours)
    yield "audio stream", lambda: list(litellm.completion(messages=user(sound), stream=True, **ours))
    yield "structured stream", lambda: list(litellm.completion(
        messages=user(LONG), response_format=Said, stream=True, **ours))
    yield "batch stream", lambda: [list(answer) for answer in litellm.batch_completion(
        messages=[user("a"), user(LONG)], stream=True, **ours)]
    yield "text completion", lambda: litellm.text_completion(prompt=LONG, **{**ours, "model": "text-completion-openai/sim"})
    yield "response", lambda: litellm.responses(
        model="openai/sim", input=LONG, api_base=f"{base}/v1", api_key="none", max_output_tokens=9)
    yield "transcription", lambda: litellm.transcription(
        model="openai/sim", file=("a.wav", b"RIFF" * 2000, "audio/wav"), api_base=f"{base}/v1", api_key="none")
    yield "openai", lambda: litellm.completion(messages=marked, **{**ours, "model": "openai/sim"})
    yield "claude marked stream", lambda: list(litellm.completion(messages=marked, stream=True, **claude))
    yield "embedding", lambda: litellm.embedding(
        model="openai/sim", input=["a", LONG], api_base=f"{base}/v1", api_key="none", encoding_format="float")


def outcome(case):
    try:
        return plain(case())
    except Exception as error:  # noqa: BLE001
        return {"error": f"{type(error).__name__}: {error}"}


def main():
    report = {}
    for where, base in zip(("engine", "gateway"), sys.argv[1:3], strict=True):
        for package, cases in (("openai", openai_cases), ("anthropic", anthropic_cases), ("litellm", litellm_cases)):
            for name, case in cases(base):
                report.setdefault(f"{package}: {name}", {})[where] = outcome(case)
    json.dump(report, sys.stdout)


main()
