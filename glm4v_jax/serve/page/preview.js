// The dialog that shows what the model sees of an image or a video.
import { postJson } from "./api.js";
import { counted, element } from "./elements.js";
import { partOf } from "./media.js";

const dialog = document.getElementById("preview");
const content = dialog.querySelector(".content");
let running = null;

dialog.addEventListener("close", () => {
  running?.abort();
  content.replaceChildren();
});

/** A button that opens the dialog. */
export function previewButton(item) {
  const ariaLabel = `What the model sees of ${item.name}`;
  return element("button", { type: "button", ariaLabel, onclick: () => showPreview(item) }, "What the model sees");
}

/** Ask the server, and show its answer or what went wrong. */
async function showPreview(item) {
  running?.abort();
  const own = (running = new AbortController());
  dialog.querySelector("h2").textContent = `What the model sees of ${item.name}`;
  content.replaceChildren(element("p", { className: "note" }, "Asking the server …"));
  if (!dialog.open) dialog.showModal();
  try {
    const seen = await postJson("v1/preview", partOf(item), own.signal);
    content.replaceChildren(facts(seen), ...warning(seen), frames(seen));
  } catch (error) {
    if (!own.signal.aborted) content.replaceChildren(element("p", { className: "problem" }, error.message));
  }
}

function facts(seen) {
  const [t, h, w] = seen.grid_thw;
  const share = (100 * seen.share_of_budget).toLocaleString("en", { maximumFractionDigits: 1 });
  const patches = `${counted(seen.patches, "patch", "patches")}: ${h} rows of ${w}${t > 1 ? `, ${t} times` : ""}`;
  const rows = [
    ["Original", `${seen.width} × ${seen.height} pixels`],
    ["Seen", `${seen.seen_width} × ${seen.seen_height} pixels, ${seen.why}`],
    ["Patches", patches],
    ["Tokens", `${counted(seen.image_tokens, "image token")}, ${share}% of the most there may be`],
    ["Prompt", `${counted(seen.prompt_tokens, "token")}, tags${seen.kind === "video" ? " and times" : ""} included`],
  ];
  if (seen.kind === "video") rows.splice(1, 0, ["Sampled", sampled(seen)]);
  const entries = rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
  return element("dl", {}, ...entries);
}

function sampled(seen) {
  const [first, last] = [seen.frames_seconds[0], seen.frames_seconds.at(-1)].map((time) => time.toFixed(2));
  return `${counted(seen.frames_indices.length, "frame")} of ${seen.frames}, from ${first} to ${last} s`;
}

const warning = (seen) => (seen.warning ? [element("p", { className: "problem" }, seen.warning)] : []);

function frames(seen) {
  const isVideo = seen.kind === "video";
  const figures = seen.drawings.map((drawing) => {
    const alt = isVideo ? `Frame at ${drawing.timestamp} s, with its patches` : "The image with its patches";
    const image = element("img", { src: drawing.url, alt });
    if (!isVideo) return element("figure", {}, image);
    const times = drawing.frames.map((frame, index) => `#${frame} at ${drawing.seconds[index].toFixed(2)} s`);
    const caption = element("figcaption", {}, element("strong", {}, drawing.time_text), ` ${times.join(", ")}`);
    return element("figure", {}, image, caption);
  });
  const note = element("p", { className: "note" }, seen.legend);
  return element("div", { className: isVideo ? "frames" : "frame" }, note, ...figures);
}
