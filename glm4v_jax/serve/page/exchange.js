// One question with its answer: what is known of both, and how it is shown.
import { counted, element, fromTemplate } from "./elements.js";
import { render, withoutMarks, withoutPartialTag } from "./markdown.js";
import { boxesFigure, boxesIn, isBox, mediaElement, partOf } from "./media.js";
import { previewButton } from "./preview.js";

/** What to say where an answer did not end by itself. */
const ENDINGS = {
  length: "Cut off at Max tokens of the settings, or at the length that the server was started with.",
  stopped: "Stopped.",
  empty: "The model ended without an answer.",
};

export class Exchange {
  /** `actions`: functions of (exchange) for the buttons `retry`, `edit`, `copy`, `curl`. */
  constructor(text, media, actions) {
    this.text = text;
    this.media = media;
    this.root = fromTemplate("exchange-template");
    this.#part(".said").textContent = text;
    this.#part(".said").hidden = !text;
    this.#part(".media").append(...media.map(shownMedium));
    this.#part(".media").hidden = !media.length;
    for (const [name, action] of Object.entries(actions)) {
      this.#part(`.${name}`).addEventListener("click", (event) => action(this, event.currentTarget));
    }
    this.thoughtPart = this.#part(".thought");
    this.thoughtPart.querySelector("p").append("");
    this.restart();
  }

  #part(selector) {
    return this.root.querySelector(selector);
  }

  /** Forget the answer, and wait for a new one. */
  restart() {
    Object.assign(this, { thought: "", content: "", finish: null, usage: null, boxes: null, isRefused: false });
    Object.assign(this, { startedAt: performance.now(), firstAt: null, thoughtUntil: null, endedAt: null });
    this.thoughtPart.hidden = true;
    this.thoughtPart.open = false;
    this.thoughtPart.querySelector("p").firstChild.data = "";
    for (const selector of [".text", ".boxes"]) this.#part(selector).replaceChildren();
    this.#part(".problem").hidden = true;
    this.#part("footer").hidden = true;
    this.#part(".answer").setAttribute("aria-busy", "true");
    this.wait("Waiting for the first token …");
  }

  get isRunning() {
    return this.endedAt === null;
  }

  get hasBegun() {
    return this.firstAt !== null;
  }

  /** The message that asks. */
  get question() {
    const parts = [...this.media.map(partOf), ...(this.text ? [{ type: "text", text: this.text }] : [])];
    return { role: "user", content: this.media.length ? parts : this.text };
  }

  /** What a later request says of this exchange. What the server refused would be refused again. */
  get messages() {
    if (this.isRefused) return [];
    return [this.question, ...(this.content ? [{ role: "assistant", content: this.content }] : [])];
  }

  wait(text) {
    this.#part(".waiting").textContent = text;
  }

  /** Take a chunk of the stream; the page is changed by `show`. */
  take(chunk) {
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { content, reasoning_content: thought, boxes } = choice.delta ?? {};
    if (content || thought) this.firstAt ??= performance.now();
    if (content) this.thoughtUntil ??= performance.now();
    if (thought) {
      this.thought += thought;
      this.thoughtPart.querySelector("p").firstChild.appendData(thought);
    }
    this.content += content ?? "";
    this.finish = choice.finish_reason ?? this.finish;
    this.boxes = boxes ?? this.boxes;
  }

  /** Show what has come. */
  show() {
    render(this.#part(".text"), this.finish ? this.content : withoutPartialTag(this.content));
    this.thoughtPart.hidden = !this.thought;
    this.thoughtPart.querySelector("summary").textContent = this.#thoughtTitle();
    if (this.hasBegun) this.wait("");
  }

  #thoughtTitle() {
    const passed = Math.round(((this.thoughtUntil ?? this.endedAt ?? performance.now()) - this.firstAt) / 1000);
    if (this.isRunning && this.thoughtUntil === null) return `Thinking … ${passed} s`;
    return passed ? `Thought for ${counted(passed, "second")}` : "Thought";
  }

  /** The answer is complete, or was stopped. `images` are those that its boxes may be about. */
  end(images, ending = this.finish === "stop" && !this.content.trim() ? "empty" : this.finish) {
    this.#settle();
    this.#showBoxes(images);
    this.#part(".facts").textContent = [ENDINGS[ending], this.#facts()].filter(Boolean).join(" ");
    return ENDINGS[ending] ?? "";
  }

  /** Show what went wrong, under what had come until then. */
  fail(problem, { isRefused = false, settle = null } = {}) {
    this.isRefused = isRefused;
    this.#settle();
    this.#part(".facts").textContent = this.#facts();
    this.#part(".problem").hidden = false;
    this.#part(".problem p").textContent = problem;
    const button = this.#part(".settle");
    button.hidden = !settle;
    if (settle) Object.assign(button, { textContent: settle.label, onclick: settle.action });
  }

  #settle() {
    this.endedAt = performance.now();
    this.show();
    this.wait("");
    this.#part("footer").hidden = false;
    this.#part(".copy").hidden = !this.content;
    this.#part(".answer").setAttribute("aria-busy", "false");
  }

  #showBoxes(images) {
    const boxes = (this.boxes ?? []).filter(isBox);
    const drawn = boxes.length ? boxes : boxesIn(this.content);
    if (!images.length || !drawn.length) return;
    const part = this.#part(".boxes");
    if (images.length === 1) {
      part.append(boxesFigure(images[0], drawn));
      return;
    }
    // A text does not say reliably which of several images it speaks of.
    const place = element("div");
    const draw = (item) => place.replaceChildren(boxesFigure(item, drawn));
    const buttons = images.map((item) => element("button", { type: "button", onclick: () => draw(item) }, item.name));
    part.append(element("div", { className: "choice" }, `Draw ${counted(drawn.length, "box", "boxes")} on`, ...buttons), place);
  }

  #facts() {
    const facts = [];
    if (this.usage) {
      const { prompt_tokens: prompt, completion_tokens: made, completion_tokens_details: details } = this.usage;
      const thought = details?.reasoning_tokens;
      const thinking = thought ? `, ${thought.toLocaleString("en")} of them thought` : "";
      facts.push(`${counted(prompt, "token")} in, ${made.toLocaleString("en")} out${thinking}`);
    }
    if (this.hasBegun) {
      facts.push(`first after ${seconds(this.firstAt - this.startedAt)}, all after ${seconds(this.endedAt - this.startedAt)}`);
    }
    return facts.length ? `${facts.join("; ")}.` : "";
  }

  /** The answer as text, without the tags of the model's format. */
  get plainAnswer() {
    return withoutMarks(this.content);
  }
}

const seconds = (milliseconds) =>
  milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;

function shownMedium(item) {
  const look = previewButton(item);
  const caption = element("figcaption", {}, item.name);
  return element("li", {}, element("figure", {}, mediaElement(item), caption), look);
}
