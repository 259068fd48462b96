// Figures of the cell of the heat map that is pointed at.
(function () {
  var data = document.getElementById("heat-data"), line = document.querySelector(".hover");
  if (!data || !line) return;
  var table = JSON.parse(data.textContent);
  var width = Math.max.apply(null, table.uses.map(function (row) { return row.length; }));
  document.querySelectorAll("svg.heat").forEach(function (svg) {
    var x = svg.dataset.x.split(",").map(Number), y = svg.dataset.y.split(",").map(Number);
    svg.addEventListener("pointermove", function (event) {
      var box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
      var px = (event.clientX - box.left) * view.width / box.width, py = (event.clientY - box.top) * view.height / box.height;
      var expert = Math.floor((px - x[0]) / (x[1] - x[0]) * width);
      var row = Math.floor((py - y[0]) / (y[1] - y[0]) * table.uses.length);
      var uses = table.uses[row] && table.uses[row][expert];
      if (uses === undefined) return;
      var all = table.uses[row].reduce(function (a, b) { return a + b; }, 0);
      var times = all ? (uses * table.uses[row].length / all).toFixed(2) : "0";
      line.textContent = "Layer " + table.blocks[row] + ", expert " + expert + ": " + uses + " selections, " + times +
        " times the mean" + (table.loads ? "; read " + table.loads[row][expert] + " times" : "");
    });
  });
})();
