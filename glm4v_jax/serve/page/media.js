// Images and videos: read from files, shown, and boxes drawn over them.
import { counted, element, svg } from "./elements.js";

// As `draw_boxes` of the package has them: bright colours with a black rim are seen on any ground.
const COLOURS = ["#ffe119", "#42d4f4", "#f58231", "#bfef45", "#ff8fd8", "#ffffff"];
const NUMBER = String.raw`\s*(\d+(?:\.\d+)?)\s*`;
const BOX = new RegExp(String.raw`[\[(]${[NUMBER, NUMBER, NUMBER, NUMBER].join(",")}[\])]`, "g");
const MARKED = /<\|begin_of_box\|>([\s\S]*?)(?:<\|end_of_box\|>|$)/g;
const SCALE = 1000;
const SMALL = 256; // Images with shorter sides, in pixels, are enlarged where boxes are drawn.
const JPEG_QUALITY = 0.92;

/**
 * Read a file: {name, kind, dataUrl, url, width, height, note}. An image over the server's limits is scaled down.
 * `url` is for showing it, and has to be revoked (`release`).
 */
export async function readFile(file, limits) {
  const kind = file.type.startsWith("video/") ? "video" : "image";
  if (kind === "image" && !file.type.startsWith("image/")) {
    throw new Error(`${file.name || "file"}: found ${file.type || "an unknown type"}; expected an image or a video`);
  }
  const { blob, note } = kind === "image" ? await withinLimits(file, limits) : { blob: file, note: "" };
  if (blob.size > limits.bytes) {
    const [found, most] = [blob.size, limits.bytes].map((size) => (size / 2 ** 20).toFixed(1));
    throw new Error(`${file.name}: found ${found} MiB; expected at most ${most} MiB. Choose a shorter or smaller one.`);
  }
  const dataUrl = await readAsDataUrl(blob);
  return { name: file.name || "pasted image", kind, dataUrl, url: URL.createObjectURL(blob), note, isReleased: false };
}

export function release(media) {
  for (const item of media) {
    URL.revokeObjectURL(item.url);
    item.isReleased = true;
  }
}

async function withinLimits(file, limits) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return { blob: file, note: "" }; // The server may know the format.
  }
  const { width, height } = bitmap;
  const scale = Math.min(1, Math.sqrt(limits.pixels / (width * height)));
  if (scale === 1 && file.size <= limits.bytes) {
    bitmap.close();
    return { blob: file, note: "" };
  }
  const size = [width, height].map((side) => Math.max(1, Math.floor(side * scale)));
  const canvas = element("canvas", { width: size[0], height: size[1] });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, ...size);
  bitmap.close();
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", JPEG_QUALITY));
  return { blob, note: `Sent as ${size.join(" × ")} of ${width} × ${height} pixels: the server's limit.` };
}

function readAsDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("the file cannot be read; it may have been moved"));
    reader.readAsDataURL(blob);
  });
}

/** The part of a message. */
export function partOf(item) {
  const type = `${item.kind}_url`;
  return { type, [type]: { url: item.dataUrl } };
}

export function mediaElement(item) {
  return item.kind === "video"
    ? element("video", { src: item.url, controls: true, muted: true, preload: "metadata", ariaLabel: item.name })
    : element("img", { src: item.url, alt: item.name });
}

/** Boxes that a text names, each [x1, y1, x2, y2] from 0 to 1000: inside box tags where there are any that hold some. */
export function boxesIn(text) {
  const marked = Array.from(text.matchAll(MARKED), (match) => match[1]).join("\n");
  return Array.from(marked.matchAll(BOX), (match) => match.slice(1).map(Number)).filter(isBox);
}

export function isBox(box) {
  return Array.isArray(box) && box.length === 4 && box.every((value) => value >= 0 && value <= SCALE);
}

/** An image with boxes drawn over it and listed under it. */
export function boxesFigure(item, boxes) {
  const image = mediaElement(item);
  const frame = element("div", { className: "framed" }, image, overlay(boxes), ...labels(boxes));
  const caption = element("figcaption");
  const tell = () => {
    image.classList.toggle("small", image.naturalWidth < SMALL && image.naturalHeight < SMALL);
    const { naturalWidth: width, naturalHeight: height } = image;
    const pixels = boxes.map((box) => box.map((value, index) => Math.round((value * (index % 2 ? height : width)) / SCALE)));
    const listed = pixels.map(([x1, y1, x2, y2]) => `${x1}, ${y1} to ${x2}, ${y2}`).join("; ");
    caption.textContent = `${counted(boxes.length, "box", "boxes")}, in pixels of the image: ${listed}`;
  };
  image.addEventListener("load", tell, { once: true });
  return element("figure", {}, frame, caption);
}

function overlay(boxes) {
  const marks = boxes.map((box, index) => {
    const [left, right] = [box[0], box[2]].sort((a, b) => a - b);
    const [top, bottom] = [box[1], box[3]].sort((a, b) => a - b);
    const place = { x: left, y: top, width: right - left, height: bottom - top };
    const line = svg("rect", { ...place, class: "line", stroke: COLOURS[index % COLOURS.length] });
    return svg("g", { class: "mark" }, svg("rect", { ...place, class: "rim" }), line);
  });
  return svg("svg", { viewBox: `0 0 ${SCALE} ${SCALE}`, preserveAspectRatio: "none", "aria-hidden": "true" }, ...marks);
}

/** Numbers beside the boxes, where there are several. */
function labels(boxes) {
  if (boxes.length < 2) return [];
  return boxes.map((box, index) => {
    const label = element("span", { className: "label", ariaHidden: "true" }, String(index + 1));
    label.style.left = `${Math.min(box[0], box[2]) / 10}%`;
    label.style.top = `${Math.min(box[1], box[3]) / 10}%`;
    label.style.background = COLOURS[index % COLOURS.length];
    return label;
  });
}
