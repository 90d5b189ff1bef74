// Reads an answer out: finished sentences go to a live region, once each.
import { withoutMarks } from "./markdown.js";

// The number of a list's item ends no sentence.
const SENTENCE_END = /(?<!(?:^|\n)\s*\d{1,3})[.!?:…](?=\s)|[。！？]|\n/g;
const region = document.getElementById("live");

export function say(text) {
  if (text.trim()) region.append(Object.assign(document.createElement("p"), { textContent: text.trim() }));
}

/** An answer that is being written: `take` its text so far, `finish` it with all of it. */
export class Announcer {
  #said = 0;

  constructor() {
    region.replaceChildren();
  }

  take(text) {
    const rest = withoutMarks(text).slice(this.#said);
    const ends = Array.from(rest.matchAll(SENTENCE_END), (match) => match.index + match[0].length);
    if (ends.length) this.#tell(rest.slice(0, ends.at(-1)));
  }

  finish(text) {
    this.#tell(withoutMarks(text).slice(this.#said));
  }

  #tell(text) {
    this.#said += text.length;
    // Marks of Markdown are no words.
    const lines = text.replace(/[*`#|]+/g, "").split("\n");
    say(lines.filter((line) => /[\p{L}\p{N}]/u.test(line)).join("\n"));
  }
}
