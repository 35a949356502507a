# make run   the demo: sglang's real backend classes, plugin off and on, on this machine's GPU or on its CPU
# make test  the tests on two cores, the kernels emulated on the host, then those with real sglang classes once for each sglang
#            release; ARGS instead: pytest with these alone
# make lint  ruff and mypy, clang-format, and the compiler's warnings; make format lets them write
# make wheel a wheel that installs without nvcc, on Linux with a glibc as new as this one's, and a source distribution, in dist/;
#            make wheel-twice builds them again from a clone in another folder, and fails where a byte differs; make wheel-check
#            installs the wheel of dist/ for each python3.10 to 3.13 in PATH and runs it there; ARGS: those Pythons instead
# make e2e   real servers with speculative decoding, plugin off and on, an hour or so; needs a GPU and all of sglang; ARGS as for
#            pytest
# make mutants  small wrong changes, each of which must turn a test red, about six minutes; ARGS: words of those to run
# All set everything up in .venv first. A torch and an sglang that python3 already has are used as they are.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
EMULATED := $(addprefix tests/unit/test_,copy.py generate.py golden.py verify.py properties.py)

SOURCES := CMakeLists.txt pyproject.toml README.md $(shell find csrc patches/sglang sglang_nsa_fused -type f ! -name '*.pyc')
CPU_ONLY := $(if $(CUDACXX)$(shell command -v nvcc),,--config-settings=cmake.define.NSA_FUSED_CPU_ONLY=ON)
HAS = $(shell $(PYTHON) -c 'import importlib.util as u; print("yes" if u.find_spec("$(1)") else "")')

CSRC := $(shell find csrc tests/emulation -name '*.cc' -o -name '*.h' -o -name '*.cuh')

.PHONY: run test lint format wheel wheel-twice wheel-check e2e mutants clean
run: $(VENV)/plugin
	$(VENV)/bin/sglang-nsa-fused demo $(ARGS)

test: $(VENV)/plugin
ifeq ($(ARGS),)
	$(VENV)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/unit
	$(VENV)/bin/pytest tests/gpu
	PYTHONPATH=tests/emulation $(VENV)/bin/pytest -q -n 2 -p emulated $(EMULATED)
	$(VENV)/bin/python tests/releases/matrix.py
else
	$(VENV)/bin/pytest $(ARGS)
endif

lint: $(VENV)/lint
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)
	$(CXX) -std=c++17 -fsyntax-only -Wall -Wextra -Werror $(addprefix -isystem ,$(shell $(VENV)/bin/python -c \
	  'from tvm_ffi import libinfo; print(libinfo.find_include_path(), libinfo.find_dlpack_include_path())')) csrc/*.cc

format: $(VENV)/lint
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CSRC)

# $(call build,SOURCES,TO): of the time of the commit, so that the time of the build is not in it.
# Not libtvm_ffi: the installed apache-tvm-ffi brings it, and loads it first.
define build
export SOURCE_DATE_EPOCH=$$(git -C $(1) log -1 --format=%ct || date +%s) PATH="$(abspath $(VENV))/bin:$$PATH" && \
	python -m build --outdir $(2)/raw $(1) && \
	auditwheel repair --exclude libtvm_ffi.so --wheel-dir $(2) $(2)/raw/*.whl && \
	mv $(2)/raw/*.tar.gz $(2) && rm -r $(2)/raw
endef

wheel: $(VENV)/release
	rm -rf dist
	$(call build,.,dist)
	$(VENV)/bin/twine check --strict dist/*

wheel-twice: wheel
	rm -rf build/twice
	git clone -q . build/twice/sources
	$(call build,build/twice/sources,build/twice/dist)
	diff -r dist build/twice/dist
	@echo "byte for byte the same: $$(ls dist)"

wheel-check: $(VENV)/packages
	$(VENV)/bin/python tests/wheel/check.py $(ARGS)

e2e: $(VENV)/plugin
	$(VENV)/bin/pytest -s tests/e2e $(ARGS)

mutants: $(VENV)/plugin
	$(VENV)/bin/python tests/mutants.py $(ARGS)

$(VENV)/packages: requirements-test.txt requirements-test-nodeps.txt
	@echo "== packages, about two minutes the first time"
	$(PYTHON) -m venv $(if $(call HAS,torch),--system-site-packages) $(VENV)
	grep -vE '$(if $(call HAS,torch),^(torch|triton|numpy)==,^$$)' requirements-test.txt >$@.txt
	$(VENV)/bin/pip install -r $@.txt
	grep -vE '$(if $(call HAS,torch),^torchvision==,^$$)$(if $(call HAS,sglang),|^(sglang|xgrammar)==)' requirements-test-nodeps.txt >$@.txt
	$(VENV)/bin/pip install --no-deps -r $@.txt
	touch $@

$(VENV)/lint: $(VENV)/packages requirements-lint.txt
	$(VENV)/bin/pip install --no-deps -r requirements-lint.txt
	touch $@

$(VENV)/release: $(VENV)/packages requirements-release.txt
	$(VENV)/bin/pip install -r requirements-release.txt
	touch $@

$(VENV)/plugin: $(VENV)/packages $(SOURCES)
	@echo "== plugin, about a minute the first time"
	$(VENV)/bin/pip install --no-deps --force-reinstall $(CPU_ONLY) .
	touch $@

clean:
	rm -rf $(VENV) build
