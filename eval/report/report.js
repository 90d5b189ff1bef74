// Shows the items that match the filters, in the chosen order. Without scripts the page shows all, in the order of the data.
"use strict";
(() => {
  const form = document.getElementById("filters");
  const list = document.getElementById("items");
  const count = document.getElementById("count");
  const cards = Array.from(list.children);
  const texts = cards.map((card) =>
    Array.from(card.querySelectorAll(".text"), (element) => element.textContent.toLowerCase()).join("\n"),
  );

  const number = (card, name) => Number(card.dataset[name]);
  const orders = {
    data: (a, b) => number(a, "order") - number(b, "order"),
    worst: (a, b) => number(a, "score") - number(b, "score") || orders.data(a, b),
    best: (a, b) => number(b, "score") - number(a, "score") || orders.data(a, b),
    longest: (a, b) => number(b, "tokens") - number(a, "tokens") || orders.data(a, b),
  };

  const isAsked = (card, what) => what === "all" || card.dataset.filters.split(" ").includes(what);

  function filter() {
    const asked = new FormData(form);
    const group = asked.get("group") ?? "";
    const words = asked.get("text").toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    cards.forEach((card, index) => {
      const fits =
        isAsked(card, asked.get("show")) &&
        (group === "" || card.dataset.group === group) &&
        words.every((word) => texts[index].includes(word));
      card.hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} of ${cards.length} items`;
  }

  function sort() {
    list.append(...cards.slice().sort(orders[new FormData(form).get("sort")]));
  }

  form.addEventListener("input", (event) => {
    if (event.target.name === "sort") sort();
    filter();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { sort(); filter(); }));
  form.hidden = false;
  document.getElementById("no-script").hidden = true;
  // A browser keeps the choices when a page is reloaded.
  sort();
  filter();
})();
