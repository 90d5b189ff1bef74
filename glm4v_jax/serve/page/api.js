// Requests to the server that this page came from, and what went wrong with them.
const KEY = "glm4v-api-key";
// Of errors inside a stream, which have no status of their own.
const STATUS_OF = { server_error: 500, service_unavailable_error: 503, rate_limit_error: 429, timeout_error: 504 };

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

/** The server refused or failed: `status` is HTTP's, or that of an error inside a stream. */
export class ServerError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The server cannot be reached, or stopped in the middle of an answer. */
export class ConnectionLost extends Error {}

const headers = (hasBody) => ({
  ...(hasBody && { "Content-Type": "application/json" }),
  ...(apiKey.get() && { Authorization: `Bearer ${apiKey.get()}` }),
});

/** Send a request; a body makes it a POST. Anything but success is raised. */
async function request(path, body, signal) {
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers: headers(body !== undefined),
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      redirect: "error",
    });
  } catch (error) {
    throw signal?.aborted ? error : new ConnectionLost(error.message);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const text = await response.text().catch(() => "");
  const seconds = Number(response.headers.get("Retry-After") ?? NaN);
  return new ServerError(response.status, messageOf(text, response), Number.isFinite(seconds) ? seconds : null);
}

function messageOf(text, response) {
  try {
    const { error } = JSON.parse(text);
    return String(error.message ?? error);
  } catch {
    return response.statusText || `status ${response.status}`;
  }
}

export async function getJson(path, signal) {
  return (await request(path, undefined, signal)).json();
}

export async function postJson(path, body, signal) {
  return (await request(path, body, signal)).json();
}

/** Whether the server answers, and how far it is until then: {isReady, isReachable, message}. */
export async function health() {
  try {
    const response = await fetch("health", { cache: "no-store" });
    const found = await response.json().catch(() => ({}));
    return { isReachable: true, isReady: response.ok, ...found };
  } catch {
    return { isReachable: false, isReady: false };
  }
}

/** The chunks of a streamed chat completion. */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", body, signal);
  let isDone = false;
  try {
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") {
        isDone = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(STATUS_OF[chunk.error.type] ?? 400, String(chunk.error.message));
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ServerError || signal.aborted) throw error;
    throw new ConnectionLost(error.message);
  }
  if (!isDone) throw new ConnectionLost("the answer ended in the middle");
}

/** The data of server-sent events; comments, which keep a connection alive, are skipped. */
async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (pending + value).split(/\r?\n/);
      pending = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
