"use strict";
/* An interactive map of images and captions on a canvas: onceoverMap(container, data, options).

   data.points: [{id, kind: "image" | "caption", x: {tsne, pca}, y: {tsne, pca}, split, rank, gallery, caption, image,
     pair}]
     id is unique; x and y hold the coordinates of one projection or of both; rank (null: unknown) is that of the
     point's best correct hit among as many items as gallery says; image is an address, or null; pair (optional) is the
     id of the point to draw a line to.
   options.onselect(point): called when a point is clicked, or entered by the keyboard.
   Returns {setData(data), select(id), position(id)}: shows other points, and what was chosen and typed stays; shows a
     point; a point's place in the window, in CSS pixels.

   It builds its own controls, takes its colours from the page's variables (page.css), its looks from map.css, makes no
   inline style or handler, and so runs under a strict Content-Security-Policy. */
window.onceoverMap = (() => {
  const PROJECTIONS = { tsne: "t-SNE", pca: "PCA" };
  const COLOURINGS = { kind: "kind", split: "split", rank: "rank", word: "word" };
  // of splits: after Okabe and Ito (2008), each at 3:1 or more with both backgrounds
  const SPLITS = ["#0072b2", "#c27800", "#00805f", "#9c4f8a", "#2f86c1", "#c44f00"];
  // plasma (Smith and van der Walt, 2015) at eleven even steps; a part of it is at 3:1 or more with a background
  const PLASMA = [
    [13, 8, 135], [65, 4, 157], [106, 0, 168], [143, 13, 164], [177, 42, 144], [204, 71, 120],
    [225, 100, 98], [242, 132, 75], [252, 166, 54], [252, 206, 37], [240, 249, 33],
  ];
  const ON_LIGHT = PLASMA.slice(0, 7).reverse(); // the worst ranks stand out from the background
  const ON_DARK = PLASMA.slice(4);
  const UNSPACED = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}\p{Script=Khmer}\p{Script=Lao}]/u;
  const MARGIN = 24; // pixels around the points when all are shown
  const REACH = 14; // pixels from the pointer within which a point is found
  const MOST_ZOOM = 200;
  const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const STEP = 60; // pixels that Shift with an arrow moves the map by

  const number = (value) => value.toLocaleString("en");
  const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
  const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

  function element(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function labelled(text, control) {
    const label = element("label", "", `${text} `);
    label.append(control);
    return label;
  }

  /* Offers other choices; what was chosen stays so where it is among them. */
  function offer(control, names) {
    const chosen = control.value;
    control.replaceChildren(...Object.entries(names).map(([value, text]) => new Option(text, value)));
    if (chosen in names) control.value = chosen;
  }

  /* A test of captions for a whole word, its plural in s included; anywhere in scripts without spaces between words. */
  function matcher(word) {
    const wanted = word.trim().toLocaleLowerCase();
    if (!wanted) return null;
    if (UNSPACED.test(wanted)) return (caption) => caption.toLocaleLowerCase().includes(wanted);
    const escaped = wanted.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&");
    const pattern = new RegExp(`(?<![\\p{L}\\p{N}])${escaped}s?(?![\\p{L}\\p{N}])`, "u");
    return (caption) => pattern.test(caption.toLocaleLowerCase());
  }

  class EmbeddingMap {
    constructor(container, data, options) {
      this.options = options;
      this.current = null; // the point whose card is open
      this.chosenColouring = "kind"; // rather than come to by typing a word
      this.pointers = new Map(); // pressed, by their id
      this.isWhole = true; // all points are shown, and stay so when the view changes its size
      this.build(container);
      this.setData(data);
      this.listen();
      new ResizeObserver(() => this.resize()).observe(this.view);
    }

    /* Takes over points. Where the map was zoomed or a card is open, the projection stays, too. */
    setData(data) {
      const projection = this.isWhole && !this.current ? null : this.projection.value;
      const open = this.current?.id;
      this.points = data.points;
      this.byId = new Map(this.points.map((point) => [point.id, point]));
      this.splits = [...new Set(this.points.map((point) => point.split))].sort();
      const ranked = this.points.filter((point) => point.rank != null);
      this.bestShare = ranked.reduce((best, point) => Math.max(best, 1 / point.gallery), 0); // that all can have
      this.worstShare = ranked.reduce((worst, point) => Math.max(worst, point.rank / point.gallery), this.bestShare);
      const offered = Object.keys(PROJECTIONS).filter((name) => this.points.some((point) => point.x[name] != null));
      this.projection.replaceChildren();
      offer(this.projection, Object.fromEntries(offered.map((name) => [name, PROJECTIONS[name]])));
      if (offered.includes(projection)) this.projection.value = projection;
      const hasValues = {
        split: this.splits.length > 1,
        rank: ranked.length > 0,
        word: this.points.some((point) => point.caption),
      };
      offer(this.colouring, Object.fromEntries(Object.entries(COLOURINGS).filter(([name]) => hasValues[name] ?? true)));
      this.describeItself();
      const again = this.byId.get(open) ?? null;
      if (!again) this.open(null);
      this.current = again;
      this.project();
      this.recolour();
      this.resize();
    }

    build(container) {
      this.projection = element("select");
      this.colouring = element("select");
      this.word = element("input");
      this.word.type = "search";
      this.word.placeholder = "e.g. dog";
      this.word.autocomplete = "off";
      const bar = element("div", "map-bar");
      bar.append(labelled("Projection", this.projection), labelled("Colour by", this.colouring));
      bar.append(labelled("Word", this.word));
      this.buttons = {};
      const group = element("div", "map-buttons");
      for (const [name, sign] of [["Zoom in", "+"], ["Zoom out", "−"], ["Show all", "⤢"]]) {
        const button = element("button", "", sign);
        button.type = "button";
        button.title = name;
        button.setAttribute("aria-label", name);
        this.buttons[name] = button;
        group.append(button);
      }
      bar.append(group);

      this.view = element("div", "map-view");
      this.view.tabIndex = 0;
      this.view.setAttribute("role", "application");
      this.canvas = element("canvas");
      this.canvas.setAttribute("aria-hidden", "true");
      this.card = element("div", "map-card");
      this.card.hidden = true;
      this.view.append(this.canvas, this.card);
      this.spoken = element("div", "map-spoken");
      this.spoken.setAttribute("role", "status");
      this.legend = element("div", "map-legend");
      this.help = element("p", "map-help");
      container.classList.add("map");
      container.replaceChildren(bar, this.view, this.legend, this.help, this.spoken);
    }

    /* The help below the map, which is also read out. */
    describeItself() {
      const images = this.points.filter((point) => point.kind === "image").length;
      const summary = `Map of ${plural(images, "image")} and ${plural(this.points.length - images, "caption")}.`;
      const opens = Boolean(this.options.onselect);
      const rings = this.points.some((point) => this.byId.has(point.pair))
        ? " A ring marks the open point; a line leads to a second ring, around the image or caption that belongs to it." : "";
      const keys = `Arrow keys go from point to point,${opens ? " Enter opens one," : ""} + and − zoom, 0 shows all.`;
      this.view.setAttribute("aria-label", `${summary} ${keys}`);
      const pointer = "Click or tap the map, then scroll or pinch to zoom and drag to move.";
      const opening = opens ? " A click opens a point; with a finger, the second tap does." : "";
      this.help.textContent = `${summary} ${pointer}${opening} ${keys}${rings}`;
    }

    listen() {
      this.projection.addEventListener("change", () => {
        this.project();
        this.showAll();
      });
      this.colouring.addEventListener("change", () => {
        if (this.colouring.value === "word") this.word.focus();
        this.chosenColouring = this.colouring.value;
        this.recolour();
      });
      this.word.addEventListener("input", () => {
        this.colouring.value = this.word.value.trim() ? "word" : this.chosenColouring;
        this.recolour();
      });
      this.buttons["Zoom in"].addEventListener("click", () => this.zoom(1.5));
      this.buttons["Zoom out"].addEventListener("click", () => this.zoom(1 / 1.5));
      this.buttons["Show all"].addEventListener("click", () => this.showAll());
      this.view.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
      this.view.addEventListener("pointerdown", (event) => this.onPress(event));
      this.view.addEventListener("pointermove", (event) => this.onMove(event));
      this.view.addEventListener("pointerup", (event) => this.onRelease(event));
      this.view.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
      this.view.addEventListener("pointerleave", (event) => {
        if (event.pointerType === "mouse" && !this.pointers.size) this.open(null);
      });
      this.view.addEventListener("keydown", (event) => this.onKey(event));
      const recolour = () => this.recolour();
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
      matchMedia("print").addEventListener("change", () => {
        recolour();
        this.resize();
        this.draw(); // at once: what is printed does not wait for a frame
      });
    }

    /* Takes over the chosen projection: coordinates in a square of side 1, and the points that have some. */
    project() {
      const name = this.projection.value;
      this.placed = this.points.filter((point) => Number.isFinite(point.x[name]) && Number.isFinite(point.y[name]));
      const xs = this.placed.map((point) => point.x[name]);
      const ys = this.placed.map((point) => point.y[name]);
      const left = xs.reduce((a, b) => Math.min(a, b), Infinity);
      const bottom = ys.reduce((a, b) => Math.min(a, b), Infinity);
      this.width = xs.reduce((a, b) => Math.max(a, b), -Infinity) - left;
      this.height = ys.reduce((a, b) => Math.max(a, b), -Infinity) - bottom;
      const side = Math.max(this.width, this.height) || 1;
      this.width /= side;
      this.height /= side;
      this.places = new Map();
      this.placed.forEach((point, index) => {
        this.places.set(point, [(xs[index] - left) / side, this.height - (ys[index] - bottom) / side]);
      });
      if (!this.places.has(this.current)) this.open(null);
    }

    resize() {
      if (!this.view.clientWidth || !this.view.clientHeight) return; // not shown at the moment
      const middle = this.scale ? this.toMap(this.boxWidth / 2, this.boxHeight / 2) : null;
      this.boxWidth = this.view.clientWidth;
      this.boxHeight = this.view.clientHeight;
      this.ratio = window.devicePixelRatio || 1;
      this.canvas.width = Math.round(this.boxWidth * this.ratio);
      this.canvas.height = Math.round(this.boxHeight * this.ratio);
      if (this.isWhole) this.showAll();
      else this.centre(middle);
    }

    /* The scale, in pixels for the whole square, at which all points fit into the view. */
    get fitScale() {
      const across = (this.boxWidth - 2 * MARGIN) / (this.width || 1);
      const down = (this.boxHeight - 2 * MARGIN) / (this.height || 1);
      return Math.max(1, Math.min(across, down));
    }

    showAll() {
      this.isWhole = true;
      if (!this.boxWidth) return;
      this.scale = this.fitScale;
      this.centre([this.width / 2, this.height / 2]);
    }

    centre([x, y]) {
      this.left = this.boxWidth / 2 - x * this.scale;
      this.top = this.boxHeight / 2 - y * this.scale;
      this.redraw();
    }

    toMap(x, y) {
      return [(x - this.left) / this.scale, (y - this.top) / this.scale];
    }

    /* A point's place in the view, in CSS pixels. */
    toView(point) {
      const [x, y] = this.places.get(point);
      return [x * this.scale + this.left, y * this.scale + this.top];
    }

    /* Zooms by a factor around a place in the view, by default the open point or the middle. */
    zoom(factor, around) {
      if (!this.scale) return;
      const [x, y] = around ?? (this.current ? this.toView(this.current) : [this.boxWidth / 2, this.boxHeight / 2]);
      const before = this.scale;
      this.scale = clamp(before * factor, this.fitScale / 2, this.fitScale * MOST_ZOOM);
      this.left = x - (x - this.left) * this.scale / before;
      this.top = y - (y - this.top) * this.scale / before;
      this.isWhole = false;
      this.redraw();
    }

    pan(dx, dy) {
      this.left += dx;
      this.top += dy;
      this.isWhole = false;
      this.redraw();
    }

    within(event) {
      const box = this.canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    }

    onWheel(event) {
      if (document.activeElement !== this.view && !event.ctrlKey) return; // the page scrolls
      event.preventDefault();
      const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 20 : 1;
      this.zoom(Math.exp(-clamp(event.deltaY * lines, -300, 300) / 400), this.within(event));
    }

    onPress(event) {
      if (event.button !== 0) return;
      this.view.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, this.within(event));
      this.moved = this.pointers.size > 1;
      this.pressedAt = this.within(event);
    }

    onMove(event) {
      const now = this.within(event);
      const before = this.pointers.get(event.pointerId);
      if (!before) {
        if (event.pointerType === "mouse") this.open(this.nearest(now));
        return;
      }
      if (!this.moved && Math.hypot(now[0] - this.pressedAt[0], now[1] - this.pressedAt[1]) < 4) return;
      this.moved = true;
      if (this.pointers.size === 1) {
        this.pan(now[0] - before[0], now[1] - before[1]);
      } else {
        const other = [...this.pointers].find(([id]) => id !== event.pointerId)[1];
        const middle = [(before[0] + other[0]) / 2, (before[1] + other[1]) / 2];
        this.pan((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
        const apart = Math.hypot(before[0] - other[0], before[1] - other[1]) || 1;
        this.zoom(Math.hypot(now[0] - other[0], now[1] - other[1]) / apart, middle);
      }
      this.pointers.set(event.pointerId, now);
    }

    onRelease(event) {
      if (!this.pointers.delete(event.pointerId) || this.moved) return;
      const point = this.nearest(this.within(event));
      const again = point === this.current;
      this.open(point);
      // a finger cannot hover: its first tap shows the point, its second opens it
      if (point && (again || event.pointerType === "mouse")) this.choose(point);
    }

    onKey(event) {
      const direction = DIRECTIONS[event.key];
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      if (direction && event.shiftKey) this.pan(-direction[0] * STEP, -direction[1] * STEP);
      else if (direction) this.show(this.current ? this.neighbour(direction) : this.middle());
      else if (event.key === "+" || event.key === "=") this.zoom(1.5);
      else if (event.key === "-") this.zoom(1 / 1.5);
      else if (event.key === "0" || event.key === "Home") this.showAll();
      else if (event.key === "Escape") this.open(null);
      else if (event.key === "Enter" && this.current) this.choose(this.current);
      else return;
      event.preventDefault();
    }

    choose(point) {
      if (this.options.onselect) this.options.onselect(point);
    }

    /* The point nearest to a place in the view, of those within reach. */
    nearest([x, y], reach = REACH) {
      let best = null;
      let least = reach * reach;
      for (const point of this.drawn) {
        const [px, py] = this.toView(point);
        const distance = (px - x) ** 2 + (py - y) ** 2;
        if (distance <= least) {
          best = point; // of equally near ones the last drawn, which lies on top
          least = distance;
        }
      }
      return best;
    }

    middle() {
      return this.nearest([this.boxWidth / 2, this.boxHeight / 2], Infinity);
    }

    /* The nearest point within 45 degrees of a direction; else the one that is open stays. */
    neighbour([dx, dy]) {
      const [x, y] = this.places.get(this.current);
      let best = this.current;
      let least = Infinity;
      for (const point of this.placed) {
        const [px, py] = this.places.get(point);
        const along = (px - x) * dx + (py - y) * dy;
        const across = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
        const distance = Math.hypot(along, across);
        if (along > 0 && across <= along && distance < least) {
          best = point;
          least = distance;
        }
      }
      return best;
    }

    /* Opens a point and brings it into view. */
    show(point) {
      if (!point || !this.scale) return;
      const [x, y] = this.toView(point);
      const inside = x > MARGIN && y > MARGIN && x < this.boxWidth - MARGIN && y < this.boxHeight - MARGIN;
      if (!inside) {
        this.centre(this.places.get(point));
        this.isWhole = false;
      }
      this.open(point);
      this.spoken.textContent = `${this.describe(point)}: ${point.caption}`;
    }

    describe(point) {
      const facts = [point.kind, point.split];
      if (point.rank != null) facts.push(`rank ${number(point.rank)} of ${number(point.gallery)}`);
      return facts.filter(Boolean).join(", ");
    }

    /* Opens the card of a point, or closes it. */
    open(point) {
      if (point === this.current) return;
      this.current = point;
      this.card.hidden = !point;
      this.view.classList.toggle("map-found", Boolean(point));
      if (point) {
        const parts = [];
        if (point.image) {
          const image = element("img");
          image.src = point.image;
          image.alt = "";
          image.decoding = "sync";
          parts.push(image);
        }
        const caption = element("p", "map-caption", point.caption);
        caption.dir = "auto";
        parts.push(caption, element("p", "map-facts", this.describe(point)));
        const [x, y] = this.places.get(point);
        const same = this.placed.filter((other) => {
          const [ox, oy] = this.places.get(other);
          return ox === x && oy === y;
        });
        if (same.length > 1) parts.push(element("p", "map-facts", `and ${number(same.length - 1)} more at this place`));
        this.card.replaceChildren(...parts);
      }
      this.redraw();
    }

    /* Sets every point's colour, and the legend. */
    recolour() {
      const style = getComputedStyle(this.view);
      const colour = (name) => style.getPropertyValue(name).trim();
      this.colours = {
        image: colour("--image"), caption: colour("--caption"), text: colour("--text"), quiet: colour("--quiet"),
        line: colour("--line"), accent: colour("--accent"), background: colour("--background"),
      };
      const test = matcher(this.word.value);
      this.matches = new Set(test ? this.points.filter((point) => test(point.caption)) : []);
      const way = this.colouring.value;
      const isDark = matchMedia("(prefers-color-scheme: dark)").matches && !matchMedia("print").matches;
      this.scaleColours = isDark ? ON_DARK : ON_LIGHT;
      const colours = {
        kind: (point) => this.colours[point.kind],
        split: (point) => this.splitColour(point.split),
        rank: (point) => (point.rank == null ? null : this.shareColour(point.rank / point.gallery)),
        word: (point) => (!test || this.matches.has(point) ? this.colours[point.kind] : this.colours.line),
      };
      this.colourOf = colours[way];
      const order = {
        rank: (point) => (point.rank == null ? 0 : point.rank / point.gallery),
        word: (point) => Number(this.matches.has(point)),
      }[way];
      this.sorted = order ? [...this.points].sort((a, b) => order(a) - order(b)) : this.points;
      this.drawLegend(way);
      this.redraw();
    }

    splitColour(split) {
      return SPLITS[this.splits.indexOf(split) % SPLITS.length];
    }

    /* Where a share of the gallery lies on the scale of ranks, which is logarithmic: 0 to 1. */
    scaled(share) {
      if (this.worstShare === this.bestShare) return 0;
      return clamp(Math.log(share / this.bestShare) / Math.log(this.worstShare / this.bestShare), 0, 1);
    }

    /* The colour of a rank, given as its share of the gallery. */
    shareColour(share) {
      const place = this.scaled(share) * (this.scaleColours.length - 1);
      const step = Math.min(Math.floor(place), this.scaleColours.length - 2);
      const [from, to] = [this.scaleColours[step], this.scaleColours[step + 1]];
      const mixed = from.map((value, index) => Math.round(value + (to[index] - value) * (place - step)));
      return `rgb(${mixed.join(",")})`;
    }

    drawLegend(way) {
      const parts = [];
      const plain = this.colours.quiet;
      if (way === "kind" || way === "word") {
        parts.push(this.key("image", this.colours.image, "image"), this.key("caption", this.colours.caption, "caption"));
      } else {
        parts.push(this.key("image", plain, "image"), this.key("caption", plain, "caption"));
      }
      if (way === "split") {
        this.splits.forEach((split) => parts.push(this.key("", this.splitColour(split), split)));
      }
      if (way === "word") {
        const kind = this.points.some((point) => point.kind === "caption") ? "caption" : "image";
        const ofKind = this.points.filter((point) => point.kind === kind);
        const count = ofKind.filter((point) => this.matches.has(point)).length;
        const text = this.word.value.trim()
          ? `${number(count)} of ${plural(ofKind.length, kind)} with the word “${this.word.value.trim()}”`
          : "Type a word: the points with it keep their colour.";
        parts.push(element("span", "", text));
      }
      if (way === "rank") parts.push(this.rankBar());
      if (way === "rank" && this.points.some((point) => point.rank == null)) {
        parts.push(this.key("", null, "not ranked"));
      }
      this.legend.replaceChildren(...parts);
    }

    /* An entry of the legend: a mark of a kind's shape, or a square, and a text; hollow where there is no colour. */
    key(kind, colour, text) {
      const entry = element("span", "map-key");
      const mark = element("canvas");
      mark.setAttribute("aria-hidden", "true");
      const ratio = window.devicePixelRatio || 1;
      mark.width = 14 * ratio;
      mark.height = 14 * ratio;
      const pen = mark.getContext("2d");
      pen.scale(ratio, ratio);
      pen.beginPath();
      if (kind) trace(pen, kind, 7, 7, 5);
      else pen.rect(2, 2, 10, 10);
      this.paint(pen, colour);
      entry.append(mark, text);
      return entry;
    }

    /* Fills a shape; a hollow one has no colour. */
    paint(pen, colour) {
      if (colour) {
        pen.fillStyle = colour;
        pen.fill();
        return;
      }
      pen.lineWidth = 0.75;
      pen.strokeStyle = this.colours.quiet;
      pen.stroke();
    }

    /* The scale of ranks, logarithmic, with its ends and powers of ten. */
    rankBar() {
      const percent = (share) => `${Number((100 * share).toPrecision(2))}\u00a0%`;
      const entry = element("span", "map-key", `rank in the first ${percent(this.bestShare)} `);
      const bar = element("canvas", "map-scale");
      bar.setAttribute("aria-hidden", "true");
      bar.width = 160;
      bar.height = 12;
      const pen = bar.getContext("2d");
      for (let x = 0; x < 160; x += 1) {
        pen.fillStyle = this.shareColour(this.bestShare * (this.worstShare / this.bestShare) ** (x / 159));
        pen.fillRect(x, 0, 1, 12);
      }
      pen.fillStyle = this.colours.background;
      const lines = [];
      for (let power = 0.001; power < this.worstShare * (1 - 1e-9); power *= 10) {
        if (power <= this.bestShare * (1 + 1e-9)) continue;
        pen.fillRect(Math.round(159 * this.scaled(power)), 0, 1, 12);
        lines.push(percent(power));
      }
      const marked = lines.length ? `; ${lines.length > 1 ? "lines" : "line"} at ${lines.join(", ")}` : "";
      entry.append(bar, ` ${percent(this.worstShare)} of the items searched (logarithmic${marked})`);
      return entry;
    }

    redraw() {
      if (this.waiting || !this.scale) return;
      this.waiting = true;
      requestAnimationFrame(() => {
        this.waiting = false;
        this.draw();
      });
    }

    get drawn() {
      return this.sorted.filter((point) => this.places.has(point));
    }

    draw() {
      if (!this.scale) return;
      const pen = this.canvas.getContext("2d");
      pen.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
      pen.clearRect(0, 0, this.boxWidth, this.boxHeight);
      const radius = clamp(3 * Math.sqrt(Math.sqrt(this.scale / this.fitScale)), 2.5, 8);
      for (const point of this.drawn) {
        const [x, y] = this.toView(point);
        if (x < -9 || y < -9 || x > this.boxWidth + 9 || y > this.boxHeight + 9) continue;
        pen.beginPath();
        trace(pen, point.kind, x, y, this.matches.has(point) && this.colouring.value === "word" ? radius * 1.6 : radius);
        this.paint(pen, this.colourOf(point));
      }
      if (this.current) this.drawCurrent(pen, radius);
    }

    /* The open point with a ring and a line to its partner, and the card beside it. */
    drawCurrent(pen, radius) {
      const [x, y] = this.toView(this.current);
      const pair = this.byId.get(this.current.pair);
      pen.lineWidth = 2;
      pen.strokeStyle = this.colours.text;
      pen.beginPath();
      if (pair && this.places.has(pair)) {
        const [px, py] = this.toView(pair);
        pen.moveTo(x, y);
        pen.lineTo(px, py);
        pen.moveTo(px + radius + 3, py);
        pen.arc(px, py, radius + 3, 0, 2 * Math.PI);
      }
      pen.moveTo(x + radius + 3, y);
      pen.arc(x, y, radius + 3, 0, 2 * Math.PI);
      pen.stroke();
      const { offsetWidth, offsetHeight } = this.card;
      const fitsRight = x + 14 + offsetWidth <= this.boxWidth;
      const fitsLeft = x - 14 - offsetWidth >= 0;
      const pairIsRight = pair && this.places.has(pair) && this.toView(pair)[0] > x;
      const isRight = fitsRight && !(fitsLeft && pairIsRight);
      const left = isRight ? x + 14 : Math.max(0, x - 14 - offsetWidth);
      const top = clamp(y - offsetHeight / 2, 0, Math.max(0, this.boxHeight - offsetHeight));
      this.card.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
    }
  }

  /* Traces a kind's shape: a circle for an image, a triangle for a caption. */
  function trace(pen, kind, x, y, radius) {
    if (kind === "image") {
      pen.moveTo(x + radius, y);
      pen.arc(x, y, radius, 0, 2 * Math.PI);
      return;
    }
    pen.moveTo(x, y - radius * 1.2);
    pen.lineTo(x + radius * 1.1, y + radius * 0.8);
    pen.lineTo(x - radius * 1.1, y + radius * 0.8);
    pen.closePath();
  }

  return (container, data, options = {}) => {
    const map = new EmbeddingMap(container, data, options);
    return {
      setData(other) {
        map.setData(other);
      },
      select(id) {
        map.show(map.byId.get(id));
      },
      position(id) {
        const box = map.canvas.getBoundingClientRect();
        const [x, y] = map.toView(map.byId.get(id));
        return { x: x + box.left, y: y + box.top };
      },
    };
  };
})();
