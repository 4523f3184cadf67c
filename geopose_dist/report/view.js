// Draws the tile that stands in the page as JSON (see scene() in view.py): x to the right, z down the image, y up,
// in metres from the middle of the tile. Several surfaces stand side by side, or one over the other, under one camera.
"use strict";
(() => {
  const scene = JSON.parse(document.getElementById("scene").textContent);
  const stage = document.getElementById("view"), tools = document.querySelector(".tools");
  const root = document.documentElement;
  const bytes = (words) => Uint8Array.from(atob(words), (letter) => letter.charCodeAt(0));
  const { rows, columns, gsd_m: gsd } = scene, [high, wide] = scene.size;
  const UNKNOWN = 65535, extent = Math.max(high, wide) * gsd;

  let renderer;
  try {
    renderer = new THREE.WebGLRenderer({ antialias: true });
  } catch (error) {
    root.dataset.view = "no WebGL"; // the page's own sentence stays where the view would be
    return;
  }
  document.getElementById("fallback").remove();
  const canvas = renderer.domElement;
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${document.title} in three dimensions; arrow keys turn it`);
  stage.prepend(canvas);
  renderer.setScissorTest(true);

  // Geometry --------------------------------------------------------------------------------------------------
  const uv = new Float32Array(2 * rows.length * columns.length);
  rows.forEach((row, i) => columns.forEach((column, j) => {
    uv.set([column / wide, 1 - row / high], 2 * (i * columns.length + j));
  }));

  const heightsOf = (surface) => Float32Array.from(new Uint16Array(bytes(surface.agl).buffer), (cm) => (cm === UNKNOWN ? NaN : cm / 100));

  function meshOf(surface, heights) {
    const positions = new Float32Array(3 * heights.length), [shiftX, shiftY] = surface.shift;
    heights.forEach((height, vertex) => {
      const h = Number.isNaN(height) ? 0 : height;
      const x = columns[vertex % columns.length] + h * shiftX, y = rows[Math.floor(vertex / columns.length)] + h * shiftY;
      positions.set([(x - wide / 2) * gsd, h, (y - high / 2) * gsd], 3 * vertex);
    });
    const kept = bytes(surface.kept), index = [];
    const isKept = (bit) => (kept[bit >> 3] >> (bit & 7)) & 1;
    for (let i = 0, bit = 0; i < rows.length - 1; i++) {
      for (let j = 0; j < columns.length - 1; j++, bit += 2) {
        const a = i * columns.length + j, b = a + 1, c = a + columns.length, d = c + 1;
        if (isKept(bit)) index.push(a, c, b);
        if (isKept(bit + 1)) index.push(d, b, c);
      }
    }
    const geometry = new THREE.BufferGeometry();
    geometry.setAttribute("position", new THREE.BufferAttribute(positions, 3));
    geometry.setAttribute("uv", new THREE.BufferAttribute(uv, 2));
    geometry.setIndex(new THREE.BufferAttribute(new Uint32Array(index), 1));
    geometry.computeVertexNormals();
    return geometry;
  }

  // A wall repeats the colour of the edge above it, darker: a curtain that is seen to be one.
  function wallsOf(surface, geometry) {
    const pairs = new Uint32Array(bytes(surface.walls).buffer), position = geometry.getAttribute("position");
    const corners = new Float32Array(9 * pairs.length), edges = new Float32Array(6 * pairs.length);
    for (let k = 0; k < pairs.length; k += 2) {
      const [a, b] = [pairs[k], pairs[k + 1]].map((n) => [position.getX(n), position.getY(n), position.getZ(n)]);
      const [lowA, lowB] = [a, b].map(([x, , z]) => [x, 0, z]);
      const [atA, atB] = [pairs[k], pairs[k + 1]].map((n) => [uv[2 * n], uv[2 * n + 1]]);
      corners.set([...a, ...b, ...lowA, ...b, ...lowB, ...lowA], 9 * k);
      edges.set([...atA, ...atB, ...atA, ...atB, ...atB, ...atA], 6 * k);
    }
    const walls = new THREE.BufferGeometry();
    walls.setAttribute("position", new THREE.BufferAttribute(corners, 3));
    walls.setAttribute("uv", new THREE.BufferAttribute(edges, 2));
    return walls;
  }

  function coloursOf(values, low, top, map) {
    const colours = new Float32Array(3 * values.length), shade = new THREE.Color();
    const linear = map.map(([r, g, b]) => shade.setRGB(r / 255, g / 255, b / 255, THREE.SRGBColorSpace).toArray());
    values.forEach((value, vertex) => {
      const share = (value - low) / (top - low), step = Math.round(share * (map.length - 1));
      colours.set(Number.isNaN(value) ? [0.2, 0.2, 0.2] : linear[Math.min(map.length - 1, Math.max(0, step))], 3 * vertex);
    });
    return new THREE.BufferAttribute(colours, 3);
  }

  // What is drawn ---------------------------------------------------------------------------------------------
  const texture = new THREE.Texture();
  texture.colorSpace = THREE.SRGBColorSpace;
  texture.anisotropy = renderer.capabilities.getMaxAnisotropy();
  const both = THREE.DoubleSide;
  const photo = new THREE.MeshBasicMaterial({ map: texture, side: both });
  const painted = new THREE.MeshLambertMaterial({ vertexColors: true, side: both });
  const shaded = new THREE.MeshBasicMaterial({ map: texture, color: 0x8c8c8c, side: both });
  const plain = new THREE.MeshBasicMaterial({ color: 0x777d84, side: both });
  const floor = new THREE.MeshBasicMaterial({ side: both, polygonOffset: true, polygonOffsetFactor: 1, polygonOffsetUnits: 1 });

  const all = scene.surfaces.map(heightsOf), truth = all[0];
  const parts = scene.surfaces.map((surface, number) => {
    const world = new THREE.Scene(), geometry = meshOf(surface, all[number]);
    const colours = { height: coloursOf(all[number], 0, scene.top_m, scene.maps.height) };
    if (scene.error_m) {
      const errors = all[number].map((height, vertex) => height - truth[vertex]);
      colours.error = coloursOf(errors, -scene.error_m, scene.error_m, scene.maps.error);
    }
    const mesh = new THREE.Mesh(geometry, photo), ground = new THREE.Mesh(new THREE.PlaneGeometry(wide * gsd, high * gsd), floor);
    ground.rotation.x = -Math.PI / 2;
    ground.position.y = -0.1;
    const sun = new THREE.DirectionalLight(0xffffff, 2);
    sun.position.set(-1, 1.6, 0.7);
    const walls = new THREE.Mesh(wallsOf(surface, geometry), shaded);
    world.add(mesh, ground, walls, sun, new THREE.HemisphereLight(0xffffff, 0x8a8f94, 1.6));
    return { world, mesh, walls, colours };
  });

  function paint(kind) {
    for (const { mesh, walls, colours } of parts) {
      if (kind !== "image") mesh.geometry.setAttribute("color", colours[kind]);
      mesh.material = kind === "image" ? photo : painted;
      walls.material = kind === "image" ? shaded : plain;
    }
    draw();
  }

  // Camera ----------------------------------------------------------------------------------------------------
  const camera = new THREE.PerspectiveCamera(35, 1, extent / 100, extent * 20);
  const controls = new THREE.OrbitControls(camera, canvas);
  controls.maxPolarAngle = 0.495 * Math.PI;
  controls.minDistance = extent / 20;
  controls.maxDistance = extent * 6;
  const [shiftX, shiftY] = scene.surfaces[0].shift, side = Math.atan2(shiftX, shiftY);

  // Roofs lean away from the side that the camera saw, so one stands where the flow points to. The distance is such
  // that the tile just fits; it is found in steps, because perspective makes no simple formula.
  const corners = [-1, 1].flatMap((x) => [-1, 1].flatMap((z) => [0, scene.top_m].map((y) => [(x * wide * gsd) / 2, y, (z * high * gsd) / 2])));
  const point = camera.position.clone();
  function look(azimuth, polar) {
    const [across, down] = cut();
    camera.aspect = stage.clientWidth / across / (stage.clientHeight / down);
    camera.updateProjectionMatrix();
    let distance = 2 * extent;
    controls.target.set(0, 0, 0);
    for (let step = 0; step < 25; step++) {
      camera.position.setFromSphericalCoords(distance, polar, azimuth).add(controls.target);
      camera.lookAt(controls.target);
      camera.updateMatrixWorld();
      const seen = corners.map((corner) => point.set(...corner).project(camera).clone());
      const [low, top] = [Math.min(...seen.map(({ y }) => y)), Math.max(...seen.map(({ y }) => y))];
      const reach = Math.max((top - low) / 2, ...seen.map(({ x }) => Math.abs(x)));
      const shift = ((top + low) / 4) * distance * Math.tan((camera.fov * Math.PI) / 360);
      controls.target.x -= shift * Math.sin(azimuth);
      controls.target.z -= shift * Math.cos(azimuth);
      distance *= 1 + 0.7 * (reach / 0.94 - 1);
    }
    controls.update();
  }

  // Side by side on a wide screen, one over the other on a narrow one.
  function cut() {
    const beside = stage.clientWidth > 1.2 * stage.clientHeight || parts.length === 1;
    return beside ? [parts.length, 1] : [1, parts.length];
  }

  function draw() {
    const [across, down] = cut(), width = stage.clientWidth / across, height = stage.clientHeight / down;
    camera.aspect = width / height;
    camera.updateProjectionMatrix();
    parts.forEach(({ world }, number) => {
      const left = across > 1 ? number * width : 0, bottom = down > 1 ? (down - 1 - number) * height : 0;
      renderer.setViewport(left, bottom, width, height);
      renderer.setScissor(left, bottom, width, height);
      renderer.render(world, camera);
    });
    root.dataset.azimuth = ((controls.getAzimuthalAngle() * 180) / Math.PI).toFixed(1);
    root.dataset.polar = ((controls.getPolarAngle() * 180) / Math.PI).toFixed(1);
    root.dataset.distance = (camera.position.length() / extent).toFixed(3);
  }

  function fit() {
    renderer.setPixelRatio(Math.min(window.devicePixelRatio, 2));
    renderer.setSize(stage.clientWidth, stage.clientHeight, false);
    const [across] = cut();
    stage.querySelector(".names").style.gridTemplateColumns = `repeat(${across}, 1fr)`;
    draw();
  }

  function light() {
    const style = getComputedStyle(root);
    const backdrop = new THREE.Color(style.getPropertyValue("--raised").trim());
    floor.color = new THREE.Color(style.getPropertyValue("--hidden").trim());
    for (const { world } of parts) world.background = backdrop;
    draw();
  }

  // view.html#azimuth=120&polar=60&paint=height starts there: degrees from below the tile, and from straight above.
  const asked = new URLSearchParams(location.hash.slice(1));
  const degrees = (name, otherwise) => (asked.has(name) ? (Number(asked.get(name)) * Math.PI) / 180 : otherwise);
  const home = () => look(degrees("azimuth", side), degrees("polar", 0.3 * Math.PI));
  const turn = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (!(event.key in turn)) return;
    event.preventDefault();
    const [round, over] = turn[event.key], step = Math.PI / 18, offset = camera.position.clone().sub(controls.target);
    const polar = Math.min(controls.maxPolarAngle, Math.max(0.01, controls.getPolarAngle() + over * step));
    offset.setFromSphericalCoords(offset.length(), polar, controls.getAzimuthalAngle() + round * step);
    camera.position.copy(controls.target).add(offset);
    controls.update();
    draw();
  });
  controls.addEventListener("change", draw);
  tools.addEventListener("change", (event) => paint(event.target.value));
  tools.addEventListener("click", ({ target }) => {
    if (target.value === "reset") home();
    if (target.value === "above") look(0, 0.001);
    draw();
  });
  tools.hidden = false;
  new ResizeObserver(fit).observe(stage);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", light);

  const picture = new Image();
  picture.addEventListener("load", () => {
    texture.image = picture;
    texture.needsUpdate = true;
    fit();
    home();
    light();
    const kind = tools.querySelector(`[value="${CSS.escape(asked.get("paint") ?? "image")}"][name="paint"]`);
    if (kind) {
      kind.checked = true;
      paint(kind.value);
    }
    root.dataset.triangles = parts.map(({ mesh }) => mesh.geometry.index.count / 3).join(" ");
    root.dataset.view = "ready";
  });
  picture.src = scene.texture;
})();
