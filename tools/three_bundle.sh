#!/usr/bin/env bash
# Makes geopose_dist/report/three.min.js: the parts of three.js that the 3D view uses, minified, its licence on top.
# Needs node with npm; only for a new version of the library, never for an installation or a test.
set -euo pipefail
cd "$(dirname "$0")/.."

THREE=0.187.0
ESBUILD=0.28.2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/entry.js" <<'JS'
export {
  BufferAttribute, BufferGeometry, Color, DirectionalLight, DoubleSide, HemisphereLight, Mesh, MeshBasicMaterial,
  MeshLambertMaterial, PerspectiveCamera, PlaneGeometry, SRGBColorSpace, Scene, Texture, WebGLRenderer,
} from "three";
export { OrbitControls } from "three/examples/jsm/controls/OrbitControls.js";
JS
out=$PWD/geopose_dist/report/three.min.js
cd "$work"
npm init --yes > npm.log
npm install --no-audit --no-fund "three@$THREE" "esbuild@$ESBUILD" >> npm.log
{
  printf '/*! three.js %s (the parts that entry.js of tools/three_bundle.sh names)\n\n' "$THREE"
  cat node_modules/three/LICENSE
  printf '*/\n'
  npx esbuild entry.js --bundle --minify --format=iife --global-name=THREE --target=es2022 --legal-comments=none
} > bundle.js
# The page's parser ends a script at this word, whatever it stands in.
if grep -qi '</script' bundle.js; then
  echo "the bundle holds </script and cannot stand in a page" >&2
  exit 1
fi
mv bundle.js "$out"
ls -l "$out"
