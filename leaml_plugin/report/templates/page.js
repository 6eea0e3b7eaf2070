"use strict";
// Galleries: filters, search, pages and keys. Texts and thumbnails come in chunks, as scripts, because a page that is
// opened from disk may not fetch files. Everything enters the page as text or as an attribute, never as markup.
(() => {
  const folder = document.body.dataset.files;
  const waiting = new Map(); // chunk name -> what to do with its data
  const chunks = new Map(); // file -> promise of its data
  window.leamlChunk = (name, data) => waiting.get(name)?.(data);

  function load(file) {
    if (chunks.has(file)) return chunks.get(file);
    const name = file.replace(/\.[0-9a-f]+\.js$/, "");
    const promise = new Promise((resolve, reject) => {
      const script = document.createElement("script");
      waiting.set(name, resolve);
      script.src = folder + "/" + file;
      script.onload = () => {
        script.remove(); // its data has arrived by now, unless the file is not what it was
        reject(new Error(folder + "/" + file + " is damaged: write the report again."));
      };
      script.onerror = () => {
        chunks.delete(file);
        reject(new Error("Cannot read " + folder + "/" + file + ": keep that folder beside this page."));
      };
      document.head.append(script);
    });
    chunks.set(file, promise);
    // thumbnails are large: only the chunks used last stay in memory
    const thumbs = [...chunks.keys()].filter((f) => f.includes("-pictures-"));
    if (thumbs.length > 40) chunks.delete(thumbs[0]);
    return promise;
  }

  const number = (n) => String(n).replace(/\B(?=(\d{3})+$)/g, "\u202f");

  class Gallery {
    constructor(root) {
      this.root = root;
      this.index = JSON.parse(root.querySelector(".index").textContent);
      this.list = root.querySelector(".cards");
      this.line = root.querySelector(".status-line");
      this.all = this.index.masks.map((_, i) => i);
      this.matches = this.all;
      this.page = 0;
      this.turn = 0; // counts drawings, so that a late one gives way to a newer one
      const on = (selector, event, action) =>
        root.querySelectorAll(selector).forEach((element) => element.addEventListener(event, action));
      on(".by-status, .by-family", "change", () => this.filter());
      on(".tools", "submit", (event) => (event.preventDefault(), this.filter()));
      on(".words", "search", () => this.filter());
      on(".previous", "click", () => this.go(this.page - 1));
      on(".next", "click", () => this.go(this.page + 1));
      on(".page", "change", (event) => this.go((parseInt(event.target.value, 10) || 1) - 1));
      on(".page", "keydown", (event) => event.key === "Enter" && this.go((parseInt(event.target.value, 10) || 1) - 1));
      root.querySelector(".tools").hidden = false;
      this.list.addEventListener("focusin", (event) => this.rove(event.target.closest(".card")));
      this.label();
      this.rove(this.cards()[0]);
    }

    get pages() {
      return Math.max(1, Math.ceil(this.matches.length / this.index.perPage));
    }

    cards() {
      return [...this.list.querySelectorAll(".card")];
    }

    // One card is in the tab order, the others are reached by keys.
    rove(card) {
      if (!card) return;
      for (const other of this.cards()) other.tabIndex = -1;
      card.tabIndex = 0;
    }

    focus(card) {
      this.rove(card);
      card.focus();
      card.scrollIntoView({ block: "nearest" });
    }

    label() {
      const { perPage } = this.index;
      const first = this.page * perPage;
      const last = Math.min(first + perPage, this.matches.length);
      const of = this.matches.length < this.all.length ? " that match, of " + number(this.all.length) : "";
      this.line.textContent = this.matches.length
        ? "Pictures " + number(first + 1) + " to " + number(last) + " of " + number(this.matches.length) + of
        : "No picture matches.";
      for (const turn of this.root.querySelectorAll(".turn")) turn.hidden = this.pages < 2;
      for (const b of this.root.querySelectorAll(".previous")) b.disabled = this.page === 0;
      for (const b of this.root.querySelectorAll(".next")) b.disabled = this.page >= this.pages - 1;
      this.root.querySelector(".page").value = this.page + 1;
      this.root.querySelector(".pages").textContent = "of " + number(this.pages);
    }

    async filter() {
      const turn = ++this.turn;
      const status = this.root.querySelector(".by-status").value;
      const family = this.root.querySelector(".by-family").value;
      const words = this.root.querySelector(".words").value.trim().toLowerCase();
      const families = this.index.families.length;
      const fits = (pair) =>
        (status === "" || (status === "dropped" ? pair[0] > 0 : pair[0] === +status)) &&
        (family === "" || pair[1] === +family);
      const pair = (mask) => [Math.floor(mask / families), mask % families];
      const anything = status === "" && family === "";
      let found = anything ? this.all : this.all.filter((i) => this.index.masks[i].some((mask) => fits(pair(mask))));
      if (words) {
        const kept = [];
        let done = -1;
        for (const i of found) {
          const chunk = Math.floor(i / this.index.textSize);
          if (chunk !== done) {
            this.line.textContent = "Searching: " + number(i) + " of " + number(this.all.length);
            done = chunk;
          }
          let text;
          try {
            text = await this.text(i);
          } catch (error) {
            this.line.textContent = error.message;
            return;
          }
          if (turn !== this.turn) return;
          const [id, caption, , rows, source] = text;
          const own = [id, caption, source].some((t) => t.toLowerCase().includes(words));
          const said = (row) => [row[2], row[3], ...row[4].map((note) => note[1])];
          if (own || rows.some((row) => fits(row) && said(row).some((t) => t.toLowerCase().includes(words))))
            kept.push(i);
        }
        found = kept;
      }
      this.matches = found;
      await this.go(0);
    }

    async text(i) {
      const { textSize, texts } = this.index;
      return (await load(texts[Math.floor(i / textSize)]))[i % textSize];
    }

    async thumb(i) {
      const { thumbSize, thumbs } = this.index;
      return (await load(thumbs[Math.floor(i / thumbSize)]))[i % thumbSize];
    }

    async go(page, focus) {
      const turn = ++this.turn;
      page = Math.min(Math.max(page, 0), this.pages - 1);
      const { perPage } = this.index;
      const shown = this.matches.slice(page * perPage, (page + 1) * perPage);
      let texts;
      try {
        texts = await Promise.all(shown.map((i) => this.text(i)));
      } catch (error) {
        this.line.textContent = error.message;
        return;
      }
      if (turn !== this.turn) return;
      this.page = page;
      const cards = texts.map((text) => this.card(text));
      this.list.replaceChildren(...cards);
      this.label();
      this.rove(cards[0]);
      if (focus && cards.length) this.focus(focus === "last" ? cards[cards.length - 1] : cards[0]);
      else if (this.root.getBoundingClientRect().top < 0) this.root.scrollIntoView();
      await Promise.all(shown.map(async (i, n) => {
        const thumb = await this.thumb(i).catch((error) => error.message);
        if (turn === this.turn) this.picture(cards[n], texts[n], thumb);
      }));
      this.root.dataset.drawn = String(this.page + 1);
    }

    card([id, caption, frames, rows, source]) {
      const card = this.root.querySelector(".card-template").content.firstElementChild.cloneNode(true);
      const pair = this.root.querySelector(".pair-template").content.firstElementChild;
      card.querySelector(".id").textContent = id;
      card.querySelector(".caption").textContent = caption;
      card.querySelector(".source").textContent = source;
      if (frames > 1) {
        const span = document.createElement("span");
        span.className = "frames";
        span.textContent = " " + frames + " frames";
        card.querySelector(".id").after(span);
      }
      for (const [status, , question, answer, notes, logprob] of rows) {
        const [key, word] = this.index.statuses[status];
        const item = pair.cloneNode(true);
        const good = key === "" || key === "right";
        item.className = "pair " + (good ? "good" : "bad");
        item.querySelector(".mark").textContent = good ? "✓" : "✕";
        item.querySelector(".word").textContent = word;
        item.querySelector(".question").textContent = question;
        item.querySelector(".answer").textContent = answer;
        const note = item.querySelector(".note");
        for (const [lead, words] of notes) {
          const copy = note.cloneNode(true);
          copy.querySelector(".lead").textContent = lead;
          copy.querySelector(".text").textContent = words;
          note.before(copy);
        }
        note.remove();
        item.querySelector(".logprob").hidden = logprob === null;
        if (logprob !== null)
          item.querySelector(".logprob").textContent = logprob.toFixed(2).replace("-", "−") + " nats per token";
        card.querySelector(".pairs").append(item);
      }
      return card;
    }

    picture(card, [id], thumb) {
      const frame = card.querySelector(".frame");
      if (typeof thumb === "string") {
        frame.querySelector(".missing").textContent = "No picture: " + thumb;
        return;
      }
      const image = document.createElement("img");
      [image.src, image.width, image.height] = thumb;
      image.alt = "Picture " + id;
      frame.replaceChildren(image);
    }

    // Moves among the cards; over the end of a page to the next one.
    step(by, from) {
      const cards = this.cards();
      const at = cards.indexOf(from);
      if (at < 0) return cards.length && this.focus(cards[0]);
      const to = at + by;
      if (cards[to]) this.focus(cards[to]);
      else if (to >= cards.length && this.page < this.pages - 1) this.go(this.page + 1, "first");
      else if (to < 0 && this.page > 0) this.go(this.page - 1, "last");
    }

    // The card above or below, by where it stands on the screen.
    row(down, from) {
      const here = from.getBoundingClientRect();
      const others = this.cards().filter((c) => {
        const top = c.getBoundingClientRect().top;
        return down ? top > here.top + 4 : top < here.top - 4;
      });
      if (!others.length) return this.step(down ? this.cards().length : -this.cards().length, from);
      const near = (c) => {
        const box = c.getBoundingClientRect();
        return Math.abs(box.top - here.top) * 10 + Math.abs(box.left - here.left);
      };
      this.focus(others.reduce((a, b) => (near(b) < near(a) ? b : a)));
    }
  }

  const galleries = [...document.querySelectorAll(".gallery")].map((root) => new Gallery(root));
  for (const keys of document.querySelectorAll(".keys")) keys.hidden = !galleries.length;
  const shortcuts = document.querySelector(".shortcuts");

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || !galleries.length) return;
    const active = document.activeElement;
    if (active && active.closest("input, select, textarea")) return;
    const gallery = galleries.find((g) => g.root.contains(active)) || galleries[0];
    const card = active && active.closest(".card");
    const moves = card && {
      ArrowRight: () => gallery.step(1, card),
      ArrowLeft: () => gallery.step(-1, card),
      ArrowDown: () => gallery.row(true, card),
      ArrowUp: () => gallery.row(false, card),
      Home: () => gallery.focus(gallery.cards()[0]),
      End: () => gallery.focus(gallery.cards().at(-1)),
    };
    const letters = shortcuts && shortcuts.checked && {
      j: () => gallery.step(1, card),
      k: () => gallery.step(-1, card),
      n: () => gallery.go(gallery.page + 1, "first"),
      p: () => gallery.go(gallery.page - 1, "first"),
      "/": () => gallery.root.querySelector(".words").focus(),
    };
    const action = (moves && moves[event.key]) || (letters && letters[event.key]);
    if (!action) return;
    event.preventDefault();
    action();
  });

  // A table that fits needs no tab stop of its own.
  const regions = document.querySelectorAll(".scroll");
  const stops = new ResizeObserver(() => {
    for (const r of regions) r.scrollWidth > r.clientWidth ? (r.tabIndex = 0) : r.removeAttribute("tabindex");
  });
  for (const region of regions) stops.observe(region);

  // On paper nothing can be unfolded.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
})();
