// The settings dialog: what is asked for beside the messages. Kept by the browser; the API key for this tab alone.
import { apiKey } from "./api.js";
import { element } from "./elements.js";

const STORED = "glm4v-settings";
const dialog = document.getElementById("settings");
const fields = Array.from(dialog.querySelectorAll("[data-setting]"));
const keyField = document.getElementById("api-key");
const keyProblem = document.getElementById("key-problem");
const presetField = document.getElementById("preset");
const presetNote = document.getElementById("preset-note");
let presets = new Map();

/** Connect the dialog; `onClose` is called when it closes. */
export function connectSettings({ onClose }) {
  const stored = readStored();
  for (const field of fields) field.value = stored[field.dataset.setting] ?? "";
  keyField.value = apiKey.get();
  document.getElementById("open-settings").addEventListener("click", openSettings);
  document.getElementById("reset").addEventListener("click", () => {
    for (const field of fields) field.value = "";
    store();
  });
  dialog.addEventListener("input", store);
  dialog.addEventListener("close", onClose);
}

function openSettings() {
  keyProblem.hidden = true;
  dialog.showModal();
}

/** Open the dialog at the field of the key, which the server asks for. */
export function askForKey() {
  keyProblem.textContent = apiKey.get() ? "The server did not accept this API key." : "The server asks for an API key.";
  if (!dialog.open) dialog.showModal();
  keyProblem.hidden = false;
  keyField.focus();
}

/** Offer the presets of the server: [{name, description, options}]. */
export function offerPresets(found) {
  presets = new Map(found.map((preset) => [preset.name, preset]));
  const options = found.map(({ name }) => element("option", { value: name }, name));
  presetField.replaceChildren(presetField.firstElementChild, ...options);
  presetField.value = presets.has(readStored().preset) ? readStored().preset : "";
  describePreset();
}

/** The fields of a request: those of the preset, and what is set here. */
export function requestOptions() {
  const numbers = fields.filter((field) => field.type === "number" && field.value !== "" && field.validity.valid);
  const set = Object.fromEntries(numbers.map((field) => [field.dataset.setting, Number(field.value)]));
  return { ...presets.get(presetField.value)?.options, ...set };
}

export const systemPrompt = () => document.getElementById("system").value.trim();

function store() {
  // What a header cannot hold was pasted by mistake.
  apiKey.set(keyField.value.replace(/[^\x21-\x7e]/g, ""));
  const filled = fields.filter((field) => field.value !== "");
  const values = Object.fromEntries(filled.map((field) => [field.dataset.setting, field.value]));
  try {
    localStorage.setItem(STORED, JSON.stringify(values));
  } catch {
    // A browser that stores nothing: the settings hold until the page is reloaded.
  }
  describePreset();
}

function readStored() {
  try {
    return JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    return {};
  }
}

function describePreset() {
  presetNote.textContent = presets.get(presetField.value)?.description ?? "";
}
