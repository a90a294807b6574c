// As corpus.py, with the packages of npm:  node corpus.mjs ENGINE GATEWAY
import { createRequire } from 'node:module';

// The packages are in the folder that the caller names, not beside this file.
const require = createRequire(`${process.env.CLIENTS}/node/package.json`);
const OpenAI = require('openai').default ?? require('openai');
const { toFile } = require('openai');
const Anthropic = require('@anthropic-ai/sdk').default ?? require('@anthropic-ai/sdk');

const VOLATILE = new Set([
  'id', 'created', 'created_at', 'completed_at', 'cached_tokens', 'prompt_tokens_details', 'input_tokens_details',
  'cache_read_input_tokens', 'cache_creation_input_tokens', 'item_id', '_request_id', 'kv_transfer_params', 'permission',
]);
const LONG = 'A long text that both clients send. '.repeat(160);
const PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=';
const PARAMETERS = { type: 'object', properties: { town: { type: 'string' } }, required: ['town'] };
const TOOL = { type: 'function', function: { name: 'weather', description: 'The weather of a town', parameters: PARAMETERS } };
const MARK = { cache_control: { type: 'ephemeral' } };
const user = (content) => [{ role: 'user', content }];

function plain(value) {
  if (Array.isArray(value)) return value.map(plain);
  if (value === null || typeof value !== 'object') return typeof value === 'function' ? undefined : value;
  const stable = Object.entries(value).filter(([key]) => !VOLATILE.has(key));
  return Object.fromEntries(stable.map(([key, part]) => [key, plain(part)]));
}

async function all(stream) {
  const parts = [];
  for await (const part of await stream) parts.push(part);
  return parts;
}

async function refused(call) {
  try {
    await call();
  } catch (error) {
    return [error.constructor.name, error.status];
  }
  return 'no error';
}

function* openaiCases(base) {
  const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: 'none', maxRetries: 0, timeout: 20_000 });
  const chat = (more, options) => client.chat.completions.create({ model: 'sim', max_tokens: 12, ...more }, options);
  for (const [size, text] of [['short', 'Hello'], ['long', LONG]]) {
    yield [`chat ${size}`, () => chat({ messages: user(text) })];
    yield [`chat ${size} stream`, () => all(chat({ messages: user(text), stream: true, stream_options: { include_usage: true } }))];
    yield [`response ${size}`, () => client.responses.create({ model: 'sim', input: text, max_output_tokens: 9 })];
    yield [`response ${size} stream`, () => all(client.responses.create({ model: 'sim', input: text, max_output_tokens: 9, stream: true }))];
    yield [`completion ${size}`, () => client.completions.create({ model: 'sim', prompt: text, max_tokens: 9 })];
  }
  yield ['chat tools', () => chat({ messages: user(LONG), tools: [TOOL], tool_choice: 'auto' })];
  const asked = { messages: user(LONG), tools: [TOOL], tool_choice: 'required' };
  yield ['chat tool call', () => chat(asked)];
  yield ['chat tool call stream', () => all(chat({ ...asked, stream: true }))];
  yield ['chat tool call gathered', () => client.chat.completions.stream({ model: 'sim', max_tokens: 12, ...asked }).finalMessage()];
  const responseTool = { type: 'function', name: 'weather', parameters: PARAMETERS, strict: false };
  const response = { model: 'sim', input: LONG, max_output_tokens: 9, tools: [responseTool], tool_choice: 'required' };
  yield ['response tool call', () => client.responses.create(response)];
  yield ['response tool call stream', () => all(client.responses.create({ ...response, stream: true }))];
  yield ['chat batch', () => client.post('/chat/completions/batch', { body: { model: 'sim', messages: [user('a'), user(LONG)] } })];
  yield ['completion batch', () => client.completions.create({ model: 'sim', prompt: ['a', LONG], max_tokens: 5 })];
  yield ['image edit', async () => client.images.edit({
    model: 'sim', prompt: 'blue', image: await toFile(Buffer.from(PNG, 'base64'), 'a.png', { type: 'image/png' }),
  })];
  yield ['chat structured stream', () => all(chat({
    messages: user(LONG), stream: true, response_format: { type: 'json_schema', json_schema: { name: 'said', schema: PARAMETERS } },
  }))];
  yield ['chat image', () => chat({ messages: user([
    { type: 'text', text: 'What is this?' },
    { type: 'image_url', image_url: { url: `data:image/png;base64,${PNG}` } },
  ]) })];
  yield ['chat structured', () => chat({ messages: user(LONG), response_format: { type: 'json_object' } })];
  const picture = [
    { type: 'text', text: LONG },
    { type: 'image_url', image_url: { url: `data:image/png;base64,${PNG}`, detail: 'low' } },
  ];
  const sound = [
    { type: 'text', text: LONG },
    { type: 'input_audio', input_audio: { data: Buffer.from('RIFF'.repeat(500)).toString('base64'), format: 'wav' } },
  ];
  yield ['chat image stream', () => all(chat({ messages: user(picture), stream: true }))];
  yield ['chat audio', () => chat({ messages: user(sound) })];
  yield ['chat audio stream', () => all(chat({ messages: user(sound), stream: true }))];
  yield ['response image', () => client.responses.create({ model: 'sim', max_output_tokens: 9, input: [{ role: 'user', content: [
    { type: 'input_text', text: LONG },
    { type: 'input_image', image_url: `data:image/png;base64,${PNG}`, detail: 'low' },
  ] }] })];
  const format = { type: 'json_schema', name: 'said', schema: PARAMETERS, strict: true };
  for (const stream of [false, true]) {
    const structured = { model: 'sim', input: LONG, max_output_tokens: 30, stream, text: { format } };
    yield [`response structured ${stream}`, async () => {
      const answer = await client.responses.create(structured);
      return stream ? all(answer) : answer;
    }];
  }
  yield ['completion batch stream', () => all(client.completions.create({ model: 'sim', prompt: ['a', LONG], max_tokens: 5, stream: true }))];
  yield ['batch of a file', () => refused(() => client.batches.create({
    input_file_id: 'file-1', endpoint: '/v1/chat/completions', completion_window: '24h',
  }))];
  yield ['file', async () => {
    const file = await toFile(Buffer.from('{}'), 'a.jsonl');
    return refused(() => client.files.create({ file, purpose: 'batch' }));
  }];
  yield ['image', () => client.images.generate({ model: 'sim', prompt: LONG })];
  yield ['translation', async () => client.audio.translations.create({
    model: 'sim', file: await toFile(Buffer.from('RIFF'.repeat(2000)), 'a.wav', { type: 'audio/wav' }),
  })];
  yield ['chat cancelled', async () => {
    const stop = new AbortController();
    const stream = await chat({ messages: user(`${LONG} cancel`), max_tokens: 2000, stream: true }, { signal: stop.signal });
    let first;
    for await (const part of stream) {
      first = part;
      stop.abort();
      break;
    }
    return [first, await chat({ messages: user('after') })];
  }];
  yield ['embeddings', () => client.embeddings.create({ model: 'sim', input: ['a', 'b'] })];
  yield ['transcription', async () => client.audio.transcriptions.create({
    model: 'sim', file: await toFile(Buffer.from('RIFF'.repeat(2000)), 'a.wav', { type: 'audio/wav' }),
  })];
  yield ['models', () => all(client.models.list())];
  yield ['unknown model', () => refused(() => chat({ model: 'no-such-model', messages: user('x') }))];
}

function* anthropicCases(base) {
  const client = new Anthropic({ baseURL: base, apiKey: 'none', maxRetries: 0, timeout: 20_000 });
  const send = (more) => client.messages.create({ model: 'sim', max_tokens: 12, ...more });
  for (const [size, text] of [['short', 'Hello'], ['long', LONG]]) {
    yield [`message ${size}`, () => send({ messages: user(text) })];
    yield [`message ${size} stream`, async () => client.messages.stream({ model: 'sim', max_tokens: 12, messages: user(text) }).finalMessage()];
  }
  yield ['message tools', () => send({
    system: [{ type: 'text', text: LONG, ...MARK }],
    messages: user([{ type: 'text', text: 'Go on', ...MARK }]),
    tools: [{ name: 'weather', description: 'The weather', input_schema: PARAMETERS, ...MARK }],
  })];
  const tools = [{ name: 'weather', description: 'The weather', input_schema: PARAMETERS }];
  const forced = { messages: user(LONG), tools, tool_choice: { type: 'any' } };
  yield ['message tool call', () => send(forced)];
  yield ['message tool call stream', async () => client.messages.stream({ model: 'sim', max_tokens: 12, ...forced }).finalMessage()];
  yield ['message image', () => send({ messages: user([
    { type: 'image', source: { type: 'base64', media_type: 'image/png', data: PNG } },
    { type: 'text', text: 'What is this?' },
  ]) })];
  const picture = [
    { type: 'text', text: LONG },
    { type: 'image', source: { type: 'base64', media_type: 'image/png', data: PNG } },
  ];
  const document = [{ type: 'text', text: LONG }, { type: 'document', source: {
    type: 'base64', media_type: 'application/pdf', data: Buffer.from('%PDF-1.4'.repeat(500)).toString('base64'),
  } }];
  const output_config = { format: { type: 'json_schema', schema: PARAMETERS } };
  for (const [kind, asked] of [
    ['image', { messages: user(picture) }],
    ['document', { messages: user(document) }],
    ['structured', { messages: user(LONG), output_config }],
  ]) {
    yield [`message ${kind} long`, () => send(asked)];
    yield [`message ${kind} stream`, async () => client.messages.stream({ model: 'sim', max_tokens: 12, ...asked }).finalMessage()];
  }
  yield ['batch', () => refused(() => client.messages.batches.create({ requests: [
    { custom_id: 'a', params: { model: 'sim', max_tokens: 4, messages: user('x') } },
  ] }))];
  yield ['count tokens', () => client.messages.countTokens({ model: 'sim', messages: user(LONG) })];
  yield ['unknown model', () => refused(() => send({ model: 'no-such-model', messages: user('x') }))];
}

async function outcome(run) {
  try {
    return plain(await run()) ?? null;
  } catch (error) {
    return { error: `${error.constructor.name}: ${error.message}` };
  }
}

const report = {};
for (const [i, where] of ['engine', 'gateway'].entries()) {
  for (const [name, cases] of [['openai', openaiCases], ['anthropic', anthropicCases]]) {
    for (const [kind, run] of cases(process.argv[2 + i])) {
      (report[`${name}: ${kind}`] ??= {})[where] = await outcome(run);
    }
  }
}
process.stdout.write(JSON.stringify(report));
