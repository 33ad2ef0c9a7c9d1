# The agent, which serves the host in the guest; shipped in the package as kvmpy/guest/agent. Built as init is.
AGENT := ../kvmpy/guest/agent
AGENT_SOURCES := $(addprefix agent/,main.c frames.c users.c tree.c command.c files.c changes.c port.c)

.PHONY: agent
agent: $(AGENT)

$(AGENT): $(AGENT_SOURCES) agent/agent.h free.h agent/agent.mk init.mk
	$(CC) $(INIT_CFLAGS) -o $@ $(AGENT_SOURCES)
