(() => {
  const plan = JSON.parse(document.getElementById("plan").textContent);
  const figure = document.querySelector("figure");
  const area = figure.querySelector(".scroll");
  const svg = figure.querySelector("svg");
  const tip = document.getElementById("tip");
  const n = plan.instr.length;
  if (n === 0) return;
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.id = "cursor";
  svg.append(cursor);
  const mib = (kib) => (kib / 1024).toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
  let column = plan.peak;

  const row = (cls, name, kib) => {
    const tr = document.createElement("tr");
    const label = tr.insertCell();
    if (cls) {
      const swatch = document.createElement("span");
      swatch.className = "swatch " + cls;
      label.append(swatch);
    }
    label.append(name);
    tr.insertCell().textContent = mib(kib) + " MiB";
    return tr;
  };

  const show = (c) => {
    column = Math.max(0, Math.min(n - 1, c));
    const x = plan.left + ((column + 0.5) * (plan.right - plan.left)) / n;
    cursor.setAttribute("d", `M${x} ${plan.top}V${plan.bottom}`);
    const title = document.createElement("b");
    title.textContent = plan.names[plan.name[column]];
    const where = document.createElement("p");
    where.textContent = "instruction " + plan.instr[column].toLocaleString("en");
    const table = document.createElement("table");
    let sum = 0;
    plan.kib.forEach((bytes, k) => {
      sum += bytes[column];
      if (bytes[column] > 0) table.prepend(row(plan.classes[k], plan.categories[k], bytes[column]));
    });
    const total = row("", "all", sum);
    total.style.fontWeight = 650;
    table.append(total);
    tip.replaceChildren(title, where, table);
    tip.hidden = false;
    const box = svg.getBoundingClientRect();
    const outer = figure.getBoundingClientRect();
    const px = box.left - outer.left + (x / svg.viewBox.baseVal.width) * box.width;
    const right = px + 16 + tip.offsetWidth < outer.width;
    tip.style.left = (right ? px + 16 : Math.max(0, px - 16 - tip.offsetWidth)) + "px";
  };
  const hide = () => {
    tip.hidden = true;
    cursor.removeAttribute("d");
  };

  area.addEventListener("pointermove", (e) => {
    const box = svg.getBoundingClientRect();
    const x = ((e.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    if (x < plan.left || x > plan.right) return hide();
    show(Math.floor(((x - plan.left) / (plan.right - plan.left)) * n));
  });
  area.addEventListener("pointerleave", hide);
  area.addEventListener("focus", () => area.matches(":focus-visible") && show(column));
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (e) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -50, PageDown: 50 }[e.key];
    if (step) show(column + step);
    else if (e.key === "Home") show(0);
    else if (e.key === "End") show(n - 1);
    else if (e.key === "Escape") hide();
    else return;
    e.preventDefault();
  });
})();
