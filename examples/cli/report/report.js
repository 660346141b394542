// SPDX-License-Identifier: Apache-2.0
// Draws the report from the JSON in the page. All texts of the JSON are untrusted: they only ever become text nodes.
'use strict';
(() => {
  const data = JSON.parse(document.getElementById('report-data').textContent);
  const plots = typeof Chart === 'function';
  const by_name = new Map(data.policies.map((policy) => [policy.name, policy]));

  // ---- texts -----------------------------------------------------------------------------------------------------

  const element = (tag, text, properties = {}) =>
    Object.assign(document.createElement(tag), {textContent: text}, properties);
  const digits = (value) => (value === null || value === undefined ? '–' : value === 0 ? '0' : value.toPrecision(3));
  const times = (value) => (value === null || value === undefined ? '–' : value.toFixed(2) + ' ×');
  const bytes_text = (bytes) => {
    const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
    let unit = 0;
    for (; bytes >= 1024 && unit + 1 < units.length; ++unit) bytes /= 1024;
    return (bytes < 1000 ? Number(bytes.toPrecision(3)) : Math.round(bytes)) + ' ' + units[unit];
  };
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // ---- results ---------------------------------------------------------------------------------------------------

  const result_of = new Map(data.results.map((result) => [result.policy + '\n' + result.budget, result]));
  const find_result = (policy, budget) => result_of.get(policy + '\n' + budget);

  // The figures of one policy at one budget: of one layer, or over all of them (layer 'all'); null where it failed.
  const figures_of = (policy, budget, layer) => {
    const result = find_result(policy, budget);
    if (!result || result.error) return null;
    return layer === 'all' ? result : result.layers.find((entry) => String(entry.layer) === layer) || null;
  };

  // An error as a multiple of the baseline's; null where that is missing or 0.
  const ratio_of = (budget, layer, figure, error) => {
    const figures = figures_of(data.baseline, budget, layer);
    return figures && figures[figure] > 0 ? error / figures[figure] : null;
  };

  const fill_header = () => {
    const trace = data.trace;
    document.getElementById('summary').textContent =
      `${trace.tokens} tokens of prompt, ${trace.future} queries after it, layers ${trace.layers.join(', ')}; ` +
      `${trace.query_heads} query heads, ${trace.kv_heads} KV heads of ${trace.head_dim} channels. ` +
      `The full cache of these layers takes ${bytes_text(data.full_bytes)} in 16 bits.`;
    const facts = document.getElementById('facts');
    const entries = [['file', trace.file], ...Object.entries(trace.metadata)];
    for (const [key, text] of entries) facts.append(element('dt', key), element('dd', text));
    document.getElementById('made-by').textContent = `Made by ${data.program}.`;
  };

  // ---- controls --------------------------------------------------------------------------------------------------

  const add_select = (parent, title, options, chosen, changed) => {
    const select = element('select', '');
    for (const [value, text] of options) select.append(element('option', text, {value}));
    select.value = chosen;
    select.addEventListener('change', changed);
    const label = element('label', title);
    label.append(select);
    parent.append(label);
    return select;
  };

  const layer_options = data.trace.layers.map((layer) => [String(layer), 'layer ' + layer]);

  // ---- figures ---------------------------------------------------------------------------------------------------

  const any_layer = [['all', 'all layers'], ...layer_options];
  const table_controls = document.getElementById('table-controls');
  const table_layer = add_select(table_controls, 'in', any_layer, 'all', () => fill_table());
  const table_order = add_select(table_controls, 'order', [['', 'groups'],
    ...data.budgets.map((budget) => [String(budget), `error at ${budget}`])],
    String(data.budgets[Math.min(1, data.budgets.length - 1)]), () => fill_table());
  const title_of_group = new Map(data.groups.map((group) => [group.name, group.title]));

  // 1 for the smallest error of a budget; the full cache is no competitor. Policies with the same error share a rank.
  const ranks_at = (budget, layer) => {
    const errors = data.policies.filter((policy) => policy.name !== 'full_cache')
      .map((policy) => [policy.name, figures_of(policy.name, budget, layer)])
      .filter(([, figures]) => figures !== null).map(([name, figures]) => [name, figures.mean]);
    return new Map(errors.map(([name, error]) => [name, 1 + errors.filter(([, other]) => other < error).length]));
  };

  const fill_table = () => {
    const layer = table_layer.value;
    const ranks = new Map(data.budgets.map((budget) => [String(budget), ranks_at(budget, layer)]));
    const head = element('thead', '');
    const top = element('tr', '');
    const second = element('tr', '');
    top.append(element('th', 'tokens per query head'));
    second.append(element('th', 'policy'));
    for (const budget of data.budgets) {
      top.append(element('th', String(budget), {colSpan: 6, className: 'begin'}));
      second.append(element('th', 'rank', {className: 'begin'}), element('th', 'error'), element('th', 'worst'),
        element('th', 'ratio'), element('th', 'bytes'), element('th', 'ms a layer'));
    }
    head.append(top, second);
    const body = element('tbody', '');
    const order = ranks.get(table_order.value);
    const policies = [...data.policies];
    const place = (policy) => (policy.name === 'full_cache' ? 0 : order.get(policy.name) || Infinity);
    if (order) policies.sort((a, b) => (place(a) === place(b) ? 0 : place(a) - place(b)));
    let group = null;
    for (const policy of policies) {
      if (!order && policy.group !== group) {
        const heading = element('tr', '');
        heading.append(element('th', title_of_group.get(policy.group), {colSpan: 1 + 6 * data.budgets.length}));
        heading.firstChild.style.textAlign = 'left';
        body.append(heading);
      }
      group = policy.group;
      const row = element('tr', '');
      row.append(element('td', policy.name, {title: policy.description}));
      for (const budget of data.budgets) {
        const figures = figures_of(policy.name, budget, layer);
        const result = find_result(policy.name, budget);
        const rank = ranks.get(String(budget)).get(policy.name);
        const texts = figures === null ? Array(6).fill('–') : [
          rank === undefined ? '–' : String(rank), digits(figures.mean), digits(figures.worst),
          times(ratio_of(budget, layer, 'mean', figures.mean)), bytes_text(result.bytes), digits(result.milliseconds)];
        row.append(...texts.map((text, i) => element('td', text, {className: ['begin', '', '', 'ratio', '', ''][i]})));
      }
      body.append(row);
    }
    document.getElementById('figures').replaceChildren(head, body);
  };

  const fill_notes = () => {
    document.getElementById('table-note').textContent =
      [...data.notes, `Ratio: the error as a multiple of that of ${data.baseline}.`].join(' ');
    const problems = document.getElementById('problems');
    for (const result of data.results) {
      if (result.error) problems.append(element('li', `${result.policy} at ${result.budget}: ${result.error}`));
    }
    problems.hidden = problems.childElementCount === 0;
  };

  // ---- error against bytes ---------------------------------------------------------------------------------------

  // One colour a family, so that a policy at query heads and the same at KV heads are seen to belong together.
  const light_colours = ['#0b63b0', '#1a8a3a', '#d1480f', '#7a3e9d', '#b8860b', '#00838f', '#c2185b', '#6d7680',
    '#5d4037', '#33691e'];
  const dark_colours = ['#6cb2f2', '#5fd07e', '#ff8a5c', '#c39be0', '#e6c34a', '#4dd0e1', '#f48fb1', '#a7b1bb',
    '#bcaaa4', '#aed581'];
  const family = (name) => name.replace(/_(query|kv)_heads$/, '');
  const drawn = data.policies.filter((policy) => policy.name !== 'full_cache');  // whose error 0 has no logarithm
  const families = [...new Set(drawn.map((policy) => family(policy.name)))];
  const colour_of = (name) => {
    const colours = matchMedia('(prefers-color-scheme: dark)').matches ? dark_colours : light_colours;
    return colours[families.indexOf(family(name)) % colours.length];
  };

  const error_controls = document.getElementById('error-controls');
  const redraw_error = () => draw_error();
  const error_figure = add_select(error_controls, 'error',
    [['mean', 'over all queries'], ['worst', 'of the worst query']], 'mean', redraw_error);
  const error_layer = add_select(error_controls, 'in', any_layer, 'all', redraw_error);
  let error_chart = null;
  // Of many curves, those of the best policies are shown, and the baseline.
  const most_curves = 12;
  const middle = data.budgets[Math.min(1, data.budgets.length - 1)];
  const rank_at_middle = ranks_at(middle, 'all');
  const hidden = new Set(drawn.length <= most_curves + 2 ? [] : drawn.map((policy) => policy.name)
    .filter((name) => name !== data.baseline && !(rank_at_middle.get(name) <= most_curves)));

  const error_dataset = (policy) => {
    const points = [];
    for (const budget of data.budgets) {
      const result = find_result(policy.name, budget);
      const figures = figures_of(policy.name, budget, error_layer.value);
      const error = figures ? figures[error_figure.value] : null;
      // A logarithmic axis has no 0: where everything is kept there is no point.
      if (error > 0) {
        const ratio = ratio_of(budget, error_layer.value, error_figure.value, error);
        points.push({x: result.bytes, y: error, budget, ratio});
      }
    }
    const colour = colour_of(policy.name);
    return {
      label: policy.name, data: points, borderColor: colour, backgroundColor: colour, borderWidth: 2,
      borderDash: policy.heads === 'query' ? [6, 4] : [], pointRadius: 3.5, pointHoverRadius: 6,
      pointStyle: policy.heads === 'query' ? 'rectRot' : 'circle', hidden: hidden.has(policy.name),
    };
  };
  const draw_error = () => {
    if (!plots) return;
    const datasets = drawn.map(error_dataset);
    const errors = datasets.flatMap((set) => set.data.map((point) => point.y));
    // The full cache has error 0, which is nowhere on the axis: its bytes are a line.
    if (by_name.has('full_cache') && errors.length > 0) {
      datasets.push({
        label: 'full cache (error 0)', borderColor: variable('--muted'), backgroundColor: variable('--muted'),
        borderWidth: 1.5, borderDash: [2, 3], pointRadius: 0, pointHitRadius: 0,
        hidden: hidden.has('full cache (error 0)'),
        data: [Math.min(...errors), Math.max(...errors)].map((y) => ({x: data.full_bytes, y})),
      });
    }
    const ticks = [...new Set(datasets.flatMap((set) => set.data.map((point) => point.x)))].sort((a, b) => a - b);
    const around = (values, factor) => ({min: Math.min(...values) / factor, max: Math.max(...values) * factor});
    const axis = {grid: {color: variable('--line'), borderColor: variable('--line')}};
    const ticks_of = (callback) => ({color: variable('--muted'), maxRotation: 0, callback});
    const title = (text) => ({display: true, text, color: variable('--muted')});
    const options = {
      animation: false, responsive: true, maintainAspectRatio: false,
      interaction: {mode: 'nearest', intersect: false},
      scales: {
        x: {
          type: 'logarithmic', title: title('bytes kept'), ...axis, ...around(ticks, 1.15),
          afterBuildTicks: (scale) => { scale.ticks = ticks.map((value) => ({value})); },
          ticks: ticks_of((value) => bytes_text(value)),
        },
        y: {
          type: 'logarithmic', title: title('relative error of the output'), ...axis, ...around(errors, 1.15),
          ticks: ticks_of((value) => (/^[125]e/.test(value.toExponential()) ? String(value) : null)),
        },
      },
      plugins: {
        legend: {
          position: window.innerWidth < 800 ? 'bottom' : 'right',
          labels: {
            color: variable('--text'), usePointStyle: true, pointStyleWidth: 30,
            generateLabels: (chart) => Chart.defaults.plugins.legend.labels.generateLabels(chart).map((item) => ({
              ...item, pointStyle: 'line', lineWidth: 2, lineDash: chart.data.datasets[item.datasetIndex].borderDash,
            })),
          },
          onClick: (event, item, legend) => {
            const shown = !hidden.has(item.text);
            shown ? hidden.add(item.text) : hidden.delete(item.text);
            legend.chart.setDatasetVisibility(item.datasetIndex, !shown);
            legend.chart.update();
          },
        },
        tooltip: {
          filter: (item) => item.raw.budget !== undefined,
          callbacks: {
            title: (items) => items.slice(0, 1)
              .map(({raw}) => `${raw.budget} tokens per query head, ${bytes_text(raw.x)}`),
            label: (item) => {
              const ratio = item.raw.ratio === null ? '' : ` (${times(item.raw.ratio)} ${data.baseline})`;
              return `${item.dataset.label}: ${digits(item.raw.y)}${ratio}`;
            },
          },
        },
      },
    };
    if (error_chart) error_chart.destroy();
    error_chart = new Chart(document.querySelector('#error-plot canvas'), {type: 'line', data: {datasets}, options});
  };

  // ---- kept positions --------------------------------------------------------------------------------------------

  const kept_of = new Map(data.kept.map((entry) =>
    [[entry.policy, entry.budget, entry.layer].join('\n'), entry.heads]));
  const names = data.policies.map((policy) => [policy.name, policy.name]);
  const first_of = (wanted, otherwise) => (by_name.has(wanted) ? wanted : otherwise);
  const map_controls = document.getElementById('map-controls');
  const redraw_maps = () => draw_maps();
  const map_layer = add_select(map_controls, 'in', layer_options, layer_options[0][0], redraw_maps);
  const map_budget = add_select(map_controls, 'tokens per query head', data.budgets.map((n) => [String(n), String(n)]),
    String(data.budgets[Math.min(1, data.budgets.length - 1)]), redraw_maps);
  const map_first = add_select(map_controls, 'policy', names, first_of('standard', names[0][0]), redraw_maps);
  const map_second = add_select(map_controls, 'below it', [['', 'nothing'], ...names],
    first_of(data.baseline, names[names.length - 1][0]), redraw_maps);
  const add_number = (title, value) => {
    const input = element('input', '', {type: 'number', min: 0, max: data.trace.tokens, step: 1, value});
    input.addEventListener('change', redraw_maps);
    const label = element('label', title);
    label.append(input);
    map_controls.append(label);
    return input;
  };
  const range_begin = add_number('tokens from', 0);
  const range_end = add_number('to', data.trace.tokens);
  const all_tokens = element('button', 'all', {type: 'button'});
  all_tokens.addEventListener('click', () => {
    range_begin.value = 0;
    range_end.value = data.trace.tokens;
    draw_maps();
  });
  map_controls.append(all_tokens);
  const label_width = 175;
  let map_charts = [];

  // The kept stretches [begin, end) of one head from its run lengths: dropped, kept, dropped, kept, ...
  const stretches = (runs) => {
    const found = [];
    let at = 0;
    for (let i = 0; i < runs.length; ++i) {
      if (i % 2 === 1) found.push([at, at + runs[i]]);
      at += runs[i];
    }
    return found;
  };

  // Cuts a stretch at the borders of what the policy protects.
  const cut = ([begin, end], policy) => {
    const sinks = Math.min(policy.sinks, data.trace.tokens);
    const recent = Math.max(sinks, data.trace.tokens - policy.recent);
    return [[begin, Math.min(end, sinks), true], [Math.max(begin, sinks), Math.min(end, recent), false],
      [Math.max(begin, recent), end, true]].filter(([from, to]) => from < to);
  };

  const draw_map = (name, colour, shown) => {
    const policy = by_name.get(name);
    const heads = kept_of.get([name, map_budget.value, map_layer.value].join('\n'));
    const maps = document.getElementById('maps');
    const kept = heads ? heads.map((runs) => runs.reduce((sum, run, i) => sum + (i % 2 === 1 ? run : 0), 0)) : [];
    maps.append(element('p', name, {className: 'map-title'}), element('p', policy.description, {className: 'note'}));
    if (!heads) {
      const result = find_result(name, Number(map_budget.value));
      maps.append(element('p', result && result.error ? result.error : 'no kept set', {className: 'note'}));
      return;
    }
    const box = element('div', '', {className: 'map'});
    box.style.height = `${heads.length * 24 + 84}px`;
    const canvas = element('canvas', '');
    canvas.setAttribute('role', 'img');
    canvas.setAttribute('aria-label', `Tokens kept by ${name}, one row per head`);
    box.append(canvas);
    maps.append(box);
    const kind = policy.heads === 'query' ? 'query head' : 'KV head';
    const labels = heads.map((_, head) => `${kind} ${head}: ${kept[head]} kept`);
    // A stretch thinner than a pixel would fade: it is drawn a pixel wide.
    const thinnest = (shown.end - shown.begin) / Math.max(200, box.clientWidth - label_width);
    const is_shown = ([begin, end]) => end > shown.begin && begin < shown.end;
    const bars = (wants_protected) => heads.flatMap((runs, head) => stretches(runs)
      .flatMap((stretch) => cut(stretch, policy))
      .filter((part) => part[2] === wants_protected && is_shown(part))
      .map(([begin, end]) => ({x: [begin, Math.max(end, begin + thinnest)], y: labels[head], begin, end})));
    const dataset = (label, fill, wants_protected) => ({
      label, data: bars(wants_protected), backgroundColor: fill, grouped: false, borderWidth: 0, borderSkipped: false,
      barThickness: 17,
    });
    const datasets = [dataset('kept by score', colour, false)];
    const protects = [[policy.sinks, 'sinks'], [policy.recent, 'recent']].filter(([count]) => count > 0)
      .map(([count, kind_of]) => `${count} ${kind_of}`);
    if (protects.length > 0) {
      datasets.push(dataset(`protected (${protects.join(', ')})`, variable('--protected'), true));
    }
    map_charts.push(new Chart(canvas, {
      type: 'bar',
      data: {labels, datasets},
      options: {
        animation: false, responsive: true, maintainAspectRatio: false, indexAxis: 'y',
        interaction: {mode: 'nearest', axis: 'xy', intersect: false},
        scales: {
          x: {
            min: shown.begin, max: shown.end, grid: {color: variable('--line'), borderColor: variable('--line')},
            ticks: {color: variable('--muted'), maxRotation: 0},
            title: {display: true, text: 'token', color: variable('--muted')},
          },
          y: {
            // The same width in every map, so that tokens stand below each other.
            type: 'category', afterFit: (scale) => { scale.width = label_width; },
            grid: {display: false, borderColor: variable('--line')},
            ticks: {color: variable('--text'), autoSkip: false},
          },
        },
        plugins: {
          legend: {align: 'end', labels: {color: variable('--text'), boxWidth: 14, boxHeight: 10}, onClick: () => {}},
          tooltip: {
            callbacks: {
              title: (items) => items.slice(0, 1).map((item) => item.label),
              label: ({raw: {begin, end}}) =>
                (end - begin === 1 ? `token ${begin}` : `tokens ${begin}–${end - 1}, ${end - begin} in a row`),
            },
          },
        },
      },
    }));
  };

  const draw_maps = () => {
    if (!plots) return;
    for (const chart of map_charts) chart.destroy();
    map_charts = [];
    document.getElementById('maps').replaceChildren();
    const tokens = data.trace.tokens;
    const begin = Math.max(0, Math.min(tokens - 1, Math.trunc(Number(range_begin.value)) || 0));
    const end = Math.max(begin + 1, Math.min(tokens, Math.trunc(Number(range_end.value)) || tokens));
    range_begin.value = begin;
    range_end.value = end;
    draw_map(map_first.value, variable('--first'), {begin, end});
    if (map_second.value !== '') draw_map(map_second.value, variable('--second'), {begin, end});
  };

  // ---- all of it -------------------------------------------------------------------------------------------------

  fill_header();
  fill_table();
  fill_notes();
  const draw_plots = () => {
    if (plots) Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
    draw_error();
    draw_maps();
  };
  if (!plots) {
    const text = 'The program that made this report was built without Chart.js: there are no plots.';
    document.getElementById('error-plot').replaceChildren(element('p', text, {className: 'note'}));
    document.getElementById('error-plot').style.height = 'auto';
    document.getElementById('maps').replaceChildren(element('p', text, {className: 'note'}));
    error_controls.hidden = map_controls.hidden = true;
  }
  draw_plots();
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw_plots);
})();
