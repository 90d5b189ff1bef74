// Elements of the page. Whatever comes from a model, a file or a server becomes text nodes, never markup.
const SVG = "http://www.w3.org/2000/svg";

/** An element with properties and children; strings among these become text. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

export function svg(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A copy of a template's only element. */
export function fromTemplate(id) {
  return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

export function counted(number, name, several = `${name}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? name : several}`;
}
