package jobs

import (
	"context"
	"net/http"
	"time"

	"mosimg/agent/agentapi"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
	"mosimg/internal/upgrade"
)

// routes are what api says of PathJobs.
func (s *Service) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+api.PathJobs, s.handleStart)
	mux.HandleFunc("GET "+api.PathJobs, func(w http.ResponseWriter, r *http.Request) {
		unixhttp.Reply(w, s.table(r.Context(), agentapi.CallerOf(r.Context())))
	})
	for pattern, h := range map[string]func(http.ResponseWriter, *http.Request, *job){
		"GET " + api.PathJobs + "/{id}":        s.handleStatus,
		"POST " + api.PathJobs + "/{id}/move":  s.handleMove,
		"POST " + api.PathJobs + "/{id}/kill":  s.handleKill,
		"GET " + api.PathJobs + "/{id}/attach": s.handleAttach,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			j, err := s.find(r.Context(), agentapi.CallerOf(r.Context()), r.PathValue("id"))
			if err != nil {
				unixhttp.Fail(w, err)
				return
			}
			h(w, r, j)
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		unixhttp.Fail(w, fault.New(fault.NotFound, r.Method, r.URL.Path, "this agent does not know that", "is the caller of another version?"))
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if who := agentapi.CallerOf(r.Context()); !who.Local || who.UID < 0 {
			unixhttp.Fail(w, fault.New(fault.Refused, "ask for", r.URL.Path, "only users of this machine may", ""))
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// patient lets a request take longer than the server gives one.
func patient(w http.ResponseWriter) {
	c := http.NewResponseController(w)
	// A server without deadlines, as a test's, has none to lift.
	_ = c.SetReadDeadline(time.Time{})
	_ = c.SetWriteDeadline(time.Time{})
}

func (s *Service) handleStart(w http.ResponseWriter, r *http.Request) {
	var req api.JobStart
	if err := unixhttp.ReadJSON(w, r, &req); err != nil {
		unixhttp.Fail(w, err)
		return
	}
	patient(w)
	id, err := s.start(r.Context(), agentapi.CallerOf(r.Context()), req)
	if err != nil {
		unixhttp.Fail(w, err)
		return
	}
	unixhttp.Reply(w, api.JobStarted{ID: string(id)})
}

func (s *Service) handleStatus(w http.ResponseWriter, r *http.Request, j *job) {
	st, err := j.status(r.Context())
	if err != nil {
		unixhttp.Fail(w, err)
		return
	}
	unixhttp.Reply(w, st)
}

func (s *Service) handleMove(w http.ResponseWriter, r *http.Request, j *job) {
	var req api.JobMove
	if err := unixhttp.ReadJSON(w, r, &req); err != nil {
		unixhttp.Fail(w, err)
		return
	}
	patient(w)
	// A move that was asked for goes on when the asker is gone.
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	defer cancel()
	defer context.AfterFunc(s.base, cancel)()
	if err := s.move(ctx, j, req.To); err != nil {
		unixhttp.Fail(w, err)
		return
	}
	s.handleStatus(w, r, j)
}

func (s *Service) handleKill(w http.ResponseWriter, r *http.Request, j *job) {
	if err := s.kill(r.Context(), j); err != nil {
		unixhttp.Fail(w, err)
		return
	}
	unixhttp.Reply(w, struct{}{})
}

func (s *Service) handleAttach(w http.ResponseWriter, r *http.Request, j *job) {
	conn, err := upgrade.Accept(w, r, api.UpgradeJob)
	if err != nil {
		return // it has answered
	}
	defer conn.Close()
	if err := j.attach(s.base, conn); err != nil {
		s.log.Debug("mosrun detached", "job", j.id, "why", err)
	}
}
