// The chat: the composer, the conversation, and the way of a question to its answer.
import { Announcer, say } from "./announce.js";
import { apiKey, ConnectionLost, getJson, health, ServerError, streamChat } from "./api.js";
import { counted, fromTemplate } from "./elements.js";
import { Exchange } from "./exchange.js";
import { mediaElement, readFile, release } from "./media.js";
import { previewButton } from "./preview.js";
import { askForKey, connectSettings, offerPresets, requestOptions, systemPrompt } from "./settings.js";

const POLL_MILLISECONDS = 1000;
const MOST_BUSY_RETRIES = 8;
const NEAR_BOTTOM = 80;

const at = (id) => document.getElementById(id);
const [text, turns, attachedList, composer] = ["text", "turns", "attached", "composer"].map(at);
const exchanges = [];
let attached = [];
let reading = Promise.resolve();
let running = null; // {exchange, controller}
let model = "";
let limits = { body: Infinity, bytes: Infinity, pixels: Infinity, images: Infinity, videos: Infinity };

// What the server is.

let watching = null;

/** Show how far the server is until it answers; whoever waits for that, waits for the same. */
function watch() {
  watching ??= untilReady().finally(() => (watching = null));
  return watching;
}

async function untilReady() {
  for (;;) {
    const state = await health();
    showState(state);
    if (state.isReady && (model || (await introduce()))) return;
    await pause(POLL_MILLISECONDS);
  }
}

function showState({ isReady, isReachable, message }) {
  const banner = at("banner");
  banner.hidden = isReady;
  if (isReady) return;
  const words = isReachable ? message || "The server is starting." : "The server cannot be reached. Trying again.";
  // A status that is written anew is read out anew.
  if (banner.firstElementChild.textContent !== words) banner.firstElementChild.textContent = words;
  banner.querySelector("progress").hidden = !isReachable;
}

/** Ask for the model's name, the presets and the limits; returns whether the server answered. */
async function introduce() {
  try {
    const about = await getJson("page.json");
    limits = { ...limits, ...about.limits };
    offerPresets(about.presets);
    showExample(about.example);
    const { data } = await getJson("v1/models");
    model = data[0].id;
    at("model").textContent = model;
    document.title = `${model} chat`;
  } catch (error) {
    if (error.status === 401) askForKey();
    else if (error instanceof ConnectionLost) return false;
    else refuse(error.message);
  }
  return true;
}

function showExample(example) {
  at("example").hidden = !example;
  if (!example) return;
  at("example").querySelector("span").textContent = example.text;
  at("example").querySelector("button").onclick = async () => {
    const blob = await (await fetch("example.png")).blob();
    addFiles([new File([blob], "example.png", { type: "image/png" })]);
    await reading;
    text.value = example.text;
    submit();
  };
}

// The composer.

function addFiles(files) {
  refuse("");
  for (const file of files) reading = reading.then(() => addFile(file));
}

async function addFile(file) {
  try {
    const item = await readFile(file, limits);
    const problem = beyondLimits([...exchanges.flatMap((exchange) => exchange.media), ...attached, item]);
    if (problem) {
      release([item]);
      throw new Error(`${item.name}: ${problem}. Start a new chat.`);
    }
    attached.push(item);
    showAttached(item);
  } catch (error) {
    refuse(error.message);
  }
}

/** All files of a chat are sent with each of its questions. */
function beyondLimits(media) {
  const number = media.filter(({ kind }) => kind === media.at(-1).kind).length;
  const [kind, most] = [media.at(-1).kind, limits[`${media.at(-1).kind}s`]];
  if (number > most) return `found ${counted(number, kind)} in this chat; the server takes ${most}`;
  const bytes = media.reduce((sum, { dataUrl }) => sum + dataUrl.length, 0);
  const [found, room] = [bytes, limits.body].map((size) => (size / 2 ** 20).toFixed(1));
  return bytes > limits.body ? `found ${found} MiB of files in this chat; the server takes ${room}` : "";
}

function showAttached(item) {
  const entry = fromTemplate("attached-template");
  entry.querySelector("figure").prepend(mediaElement(item));
  entry.querySelector("figcaption").textContent = item.name;
  entry.querySelector(".note").textContent = item.note;
  entry.querySelector(".look").replaceWith(previewButton(item));
  const remove = entry.querySelector(".remove");
  remove.ariaLabel = `Remove ${item.name}`;
  remove.addEventListener("click", () => {
    attached = attached.filter((other) => other !== item);
    release([item]);
    entry.remove();
    text.focus();
  });
  attachedList.append(entry);
}

function refuse(problem) {
  at("refused").textContent = problem;
  at("refused").hidden = !problem;
}

async function submit() {
  await reading;
  const question = text.value.trim();
  if (running || (!question && !attached.length)) return;
  const exchange = new Exchange(question, attached, { retry, edit, copy: copyAnswer, curl: copyCurl });
  attached = [];
  attachedList.replaceChildren();
  refuse("");
  text.value = "";
  grow();
  exchanges.push(exchange);
  turns.append(exchange.root);
  run(exchange);
}

/** As many lines as the text has. */
function grow() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
}

// The way to an answer.

async function run(exchange) {
  const controller = new AbortController();
  running = { exchange, controller };
  showRunning();
  scrollToEnd();
  const announcer = new Announcer();
  try {
    await answered(exchange, controller.signal, announcer);
    announcer.finish(exchange.content);
    say(exchange.end(imagesUpTo(exchange)));
  } catch (error) {
    if (controller.signal.aborted) say(exchange.end(imagesUpTo(exchange), "stopped"));
    else fail(exchange, error);
  }
  running = null;
  showRunning();
}

/** Stream an answer; a server that is busy or starts is waited for. */
async function answered(exchange, signal, announcer) {
  // The settings are known once the server has said what it is.
  if (!model) await waitForStart(exchange, signal);
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await streamed(exchange, signal, announcer);
    } catch (error) {
      if (signal.aborted || exchange.hasBegun) throw error;
      if (error.status === 429 && attempt <= MOST_BUSY_RETRIES) await waitForPlace(exchange, error.retryAfter ?? 1, signal);
      else if (error.status === 503) await waitForStart(exchange, signal);
      else throw error;
    }
  }
}

async function streamed(exchange, signal, announcer) {
  exchange.restart();
  let frame = 0;
  const show = () => {
    frame = 0;
    if (exchange.isRunning) exchange.show();
  };
  // The seconds of a thought go on while no token comes.
  const clock = setInterval(() => exchange.hasBegun && show(), 1000);
  try {
    for await (const chunk of streamChat(requestOf(exchange), signal)) {
      exchange.take(chunk);
      announcer.take(exchange.content);
      frame ||= requestAnimationFrame(show);
    }
  } finally {
    clearInterval(clock);
    cancelAnimationFrame(frame);
  }
}

async function waitForPlace(exchange, seconds, signal) {
  for (let left = Math.ceil(seconds); left > 0; left -= 1) {
    exchange.wait(`The server is busy. Asking again in ${left} s …`);
    await pause(1000, signal);
  }
}

async function waitForStart(exchange, signal) {
  exchange.wait("Waiting for the server to start …");
  await Promise.race([watch(), pause(Infinity, signal)]);
}

function fail(exchange, error) {
  const isLost = error instanceof ConnectionLost;
  const { status } = error;
  const settings = { label: "Open settings", action: askForKey };
  const problem = isLost ? "The connection to the server was lost. Retry when it is back." : problemOf(error);
  exchange.fail(problem, {
    isRefused: status >= 400 && status < 500 && status !== 401 && status !== 429,
    settle: status === 401 ? settings : null,
  });
  say(problem);
  if (isLost) watch();
}

/** What went wrong, and what to do about it. */
function problemOf(error) {
  if (!(error instanceof ServerError)) return `This page failed: ${error.message}`;
  const { status, message } = error;
  if (status === 401) return "The server asks for an API key. Enter it in Settings, then retry.";
  if (status === 413) return `${message} Send fewer or smaller files, or start a new chat.`;
  if (status === 429) return "The server is still busy. Retry in a while.";
  if (status >= 500) return `The server failed: ${message} Retry; its log says more.`;
  return message;
}

function requestOf(exchange) {
  const until = exchanges.slice(0, exchanges.indexOf(exchange)).flatMap((other) => other.messages);
  const system = systemPrompt();
  return {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...until, exchange.question],
    ...requestOptions(),
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** The images that boxes of an answer may be about: those of its question, or the last ones before. */
function imagesUpTo(exchange) {
  const until = exchanges.slice(0, exchanges.indexOf(exchange) + 1).reverse();
  const images = until.map((other) => other.media.filter((item) => item.kind === "image"));
  return images.find((found) => found.length) ?? [];
}

// Actions.

function retry(exchange) {
  if (running) return;
  exchange.restart();
  text.focus();
  run(exchange);
}

/** Take the last question back into the composer. */
function edit(exchange) {
  if (running) return;
  exchanges.pop();
  exchange.root.remove();
  release(attached);
  attachedList.replaceChildren();
  attached = exchange.media;
  attached.forEach(showAttached);
  text.value = exchange.text;
  grow();
  text.focus();
  showRunning();
}

const copyAnswer = (exchange, button) => copy(exchange.plainAnswer, button);

function copyCurl(exchange, button) {
  const url = new URL("v1/chat/completions", document.baseURI);
  const body = JSON.stringify({ ...requestOf(exchange), stream: true }, null, 1);
  const lines = [`curl -N ${url}`, "-H 'Content-Type: application/json'"];
  if (apiKey.get()) lines.push('-H "Authorization: Bearer $GLM4V_API_KEY"');
  // From standard input: an image is longer than an argument may be.
  copy(`${lines.join(" \\\n  ")} --data-binary @- <<'JSON'\n${body}\nJSON\n`, button);
}

async function copy(content, button) {
  const isCopied = await toClipboard(content);
  const name = button.textContent;
  if (button.dataset.busy) return;
  button.dataset.busy = "yes";
  button.textContent = isCopied ? "Copied" : "Not copied";
  say(button.textContent);
  await pause(1500);
  button.textContent = name;
  delete button.dataset.busy;
}

async function toClipboard(content) {
  try {
    await navigator.clipboard.writeText(content);
    return true;
  } catch {
    // Over plain http, from another machine, a browser has the old way alone.
    const field = Object.assign(document.createElement("textarea"), { value: content });
    document.body.append(field);
    field.select();
    const isCopied = document.execCommand("copy");
    field.remove();
    return isCopied;
  }
}

function stop() {
  running?.controller.abort();
}

function newChat() {
  stop();
  release([...exchanges.flatMap((exchange) => exchange.media), ...attached]);
  exchanges.length = 0;
  attached = [];
  turns.replaceChildren();
  attachedList.replaceChildren();
  refuse("");
  showRunning();
  text.focus();
}

function showRunning() {
  at("send").hidden = running !== null;
  at("stop").hidden = running === null;
  at("new").disabled = exchanges.length === 0;
  at("empty").hidden = exchanges.length > 0;
}

// Scrolling and waiting.

let isAtEnd = true;
let lastTop = 0;

function scrollToEnd() {
  isAtEnd = true;
  document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
}

// Who scrolls up to read is not moved; what grows meanwhile is no scrolling.
document.addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = document.scrollingElement;
  if (scrollHeight - scrollTop - clientHeight < NEAR_BOTTOM) isAtEnd = true;
  else if (scrollTop < lastTop) isAtEnd = false;
  lastTop = scrollTop;
});
const grown = new ResizeObserver(() => isAtEnd && scrollToEnd());
grown.observe(turns);
grown.observe(composer);

/** Wait so long, or for ever; a signal ends it with an error. */
function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = Number.isFinite(milliseconds) ? setTimeout(resolve, milliseconds) : 0;
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    });
  });
}

// What the browser reports.

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
text.addEventListener("input", grow);
const isTouch = matchMedia("(pointer: coarse)");
text.addEventListener("keydown", (event) => {
  // While a method of input composes a character, Enter is its own; on a phone it starts a line.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouch.matches) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
});
at("stop").addEventListener("click", () => {
  stop();
  text.focus();
});
at("new").addEventListener("click", newChat);

for (const [button, input] of [["add", "files"], ["camera", "photo"]]) {
  at(button).addEventListener("click", () => at(input).click());
  at(input).addEventListener("change", (event) => {
    addFiles(Array.from(event.target.files));
    event.target.value = "";
    text.focus();
  });
}
document.addEventListener("paste", (event) => {
  const files = Array.from(event.clipboardData?.files ?? []);
  if (!files.length || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  addFiles(files);
});
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  at("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) at("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  at("drop").hidden = true;
  if (!hasFiles(event)) return;
  event.preventDefault();
  addFiles(Array.from(event.dataTransfer.files));
});

connectSettings({ onClose: () => !model && apiKey.get() && watch() });
showRunning();
watch();
