// A little Markdown: paragraphs, headings, lists, tables, code, bold. Everything else stays as it is written.
import { element } from "./elements.js";

const BOX = "<|begin_of_box|>";
const END_BOX = "<|end_of_box|>";
const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*(\S*)/;
const HEADING = /^#{1,6}\s+(.*)$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const TABLE_RULE = /^\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?$/;
const DEEPEST_LIST = 8;

/**
 * Show a text that may still grow: blocks that have not changed keep their elements, so that a selection stays, and a
 * long answer costs no more per token than a short one.
 */
export function render(target, text) {
  const blocks = blocksOf(withoutTags(text));
  blocks.forEach((lines, index) => {
    const source = lines.join("\n");
    const there = target.children[index];
    if (there?.source === source) return;
    const made = Object.assign(blockElement(lines), { source });
    if (there) there.replaceWith(made);
    else target.append(made);
  });
  while (target.children.length > blocks.length) target.lastElementChild.remove();
}

/** The text as it is read out and copied: without the tags of the model's format. */
export function withoutMarks(text) {
  return withoutTags(text).replaceAll(BOX, "").replaceAll(END_BOX, "");
}

function withoutTags(text) {
  return text.replace(/<\/?answer>/g, "").trim();
}

/** Split a text into blocks, each a list of its lines. */
function blocksOf(text) {
  const blocks = [];
  let open = null; // the fence of a code block that is not closed yet
  let isNew = true;
  for (const line of text.split("\n")) {
    if (open) {
      blocks.at(-1).push(line);
      if (line.trim() === open) open = null;
      isNew = open === null;
      continue;
    }
    const fence = FENCE.exec(line);
    if (line.trim() === "") {
      isNew = true;
    } else if (fence || HEADING.test(line)) {
      blocks.push([line]);
      open = fence ? fence[1] : null;
      isNew = !fence;
    } else if (isNew || ITEM.test(line) !== ITEM.test(blocks.at(-1)[0]) && !continuesList(blocks.at(-1), line)) {
      blocks.push([line]);
      isNew = false;
    } else {
      blocks.at(-1).push(line);
    }
  }
  return blocks;
}

/** Indented lines below an item belong to it. */
function continuesList(block, line) {
  return ITEM.test(block[0]) && /^\s+/.test(line);
}

function blockElement(lines) {
  const [first] = lines;
  const fence = FENCE.exec(first);
  if (fence) {
    const isClosed = lines.length > 1 && lines.at(-1).trim() === fence[1];
    const code = element("code", {}, lines.slice(1, isClosed ? -1 : undefined).join("\n"));
    // A long line scrolls, so the block must be reachable by keyboard.
    return element("pre", { tabIndex: 0, ariaLabel: fence[2] ? `Code, ${fence[2]}` : "Code", role: "region" }, code);
  }
  const heading = HEADING.exec(first);
  if (heading) return inlineInto(element("h3"), heading[1]);
  if (ITEM.test(first)) return list(lines);
  if (lines.length > 1 && first.includes("|") && TABLE_RULE.test(lines[1].trim())) return table(lines);
  return inlineInto(element("p"), lines.join("\n"));
}

/** A list, whose items may hold lists that are indented further; what is deeper than a page is wide is text. */
function list(lines, depth = 1) {
  const [, indent, number] = ITEM.exec(lines[0]);
  const made = element(number === undefined ? "ul" : "ol");
  if (number !== undefined) made.start = Number(number);
  let index = 0;
  while (index < lines.length) {
    const item = ITEM.exec(lines[index]);
    const below = [];
    index += 1;
    const isBelow = (line) => {
      const other = ITEM.exec(line);
      return !other || other[1].length > indent.length;
    };
    while (index < lines.length && isBelow(lines[index])) below.push(lines[index++]);
    const nested = depth < DEEPEST_LIST ? below.findIndex((line) => ITEM.test(line)) : -1;
    const own = nested < 0 ? below : below.slice(0, nested);
    const entry = inlineInto(element("li"), [item[3], ...own.map((line) => line.trim())].join("\n"));
    if (nested >= 0) entry.append(list(below.slice(nested), depth + 1));
    made.append(entry);
  }
  return made;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => element("tr", {}, ...cells(line).map((cell) => inlineInto(element(tag), cell)));
  const head = element("thead", {}, row(lines[0], "th"));
  const body = element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  const wrapper = { className: "table", tabIndex: 0, role: "region", ariaLabel: "Table" };
  return element("div", wrapper, element("table", {}, head, body));
}

const SPANS = [
  { open: "`", close: "`", make: (inside) => element("code", {}, inside) },
  { open: "**", close: "**", make: (inside) => inlineInto(element("strong"), inside) },
  { open: BOX, close: END_BOX, make: (inside) => inlineInto(element("span", { className: "boxed" }), inside) },
];

/** Append a text, with its spans, to an element. Nothing is looked for twice, so that no text takes long. */
function inlineInto(target, text) {
  const next = new Map(SPANS.map((span) => [span, text.indexOf(span.open)]));
  let shown = 0;
  for (;;) {
    for (const [span, at] of next) if (at >= 0 && at < shown) next.set(span, text.indexOf(span.open, shown));
    const [span, at] = Array.from(next).filter(([, at]) => at >= 0).sort(([, a], [, b]) => a - b)[0] ?? [];
    if (!span) break;
    const start = at + span.open.length;
    const end = text.indexOf(span.close, start);
    if (end < 0) {
      next.set(span, -1);
    } else if (end === start) {
      // Nothing between the marks: they are text.
      next.set(span, text.indexOf(span.open, end + span.close.length));
    } else {
      appendText(target, text.slice(shown, at));
      target.append(span.make(text.slice(start, end)));
      shown = end + span.close.length;
    }
  }
  appendText(target, text.slice(shown));
  return target;
}

function appendText(target, text) {
  const shown = text.replaceAll(BOX, "").replaceAll(END_BOX, "");
  if (shown) target.append(shown);
}

/** A text that is still being written, without what may be the beginning of a tag. */
export function withoutPartialTag(text) {
  return text.replace(/<(?:\|\w*\|?|\/?\w{0,6})?$/, "");
}
